"""The real service, hurt at random moments under load, and a checker that trusts only what it was answered.

`python -m tests.faults --help` has the options; every random choice comes from the seed.
"""
