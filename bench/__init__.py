"""The measurement behind `make bench`: the service, vLLM's own server and the bare engine under one load."""
