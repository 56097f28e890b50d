"""Episodic: a stateful agent service on top of a language model.

docs/architecture.md describes the packages and which of them may import which. import-linter enforces these rules
(pyproject.toml).
"""
