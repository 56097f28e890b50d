"""Routes: one module for each resource. A handler translates the request, calls the sessions, translates the result."""
