"""Benchmarks. `make bench` compares the service, vLLM's own server and the bare engine under the same load."""
