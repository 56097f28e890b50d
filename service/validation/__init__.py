"""Validation of JSON and JSON schemas from callers: strict, with limits on size, nesting and computation."""
