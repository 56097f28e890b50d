"""What every HTTP request passes: server limits, API keys, body parsing, problem documents, schemas, serialization."""
