"""Implements the engine with vLLM. Only this package imports vLLM or torch, and only when an engine is loaded."""
