"""JSON and JSON schemas that come from outside: strict, and bounded in size, nesting and work."""
