"""The image and the compose stack on a real Docker engine: built, brought up, played, hurt, backed up and restored.

`python -m tests.lab --help` has the options.
"""
