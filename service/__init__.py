"""Episodic: a stateful agent service over vLLM."""
