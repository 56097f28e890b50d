"""Tests of the image and the compose stack on a real Docker engine: build, start, load, faults, backup and restore.

`python -m tests.lab --help` lists the options.
"""
