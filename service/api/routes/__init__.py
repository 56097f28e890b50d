"""One module for each resource of the HTTP contract. A handler translates, calls the sessions, and translates back."""
