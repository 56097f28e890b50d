"""Trains the packaged policy from scratch. This package is not installed with the service."""
