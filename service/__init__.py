"""Episodic: a stateful agent service over a language model.

`ls service` is the architecture; docs/architecture.md draws which package may import which, and import-linter
enforces it (pyproject.toml).
"""
