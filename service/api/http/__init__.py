"""Code that all HTTP calls share: server limits, API keys, body parsing, problem documents, schemas, serialization."""
