"""Fault injection: kills or stops parts of the real service at random moments, under load.

A checker then compares what the service stored with the answers that its callers received. `python -m tests.faults
--help` lists the options. Every random choice comes from the seed.
"""
