"""The HTTP face: one module a resource; a handler translates and calls."""
