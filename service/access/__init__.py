"""Access control: API keys, quotas, and admission of acts to the engine.

This package may import the store (which contains the keys), settings and errors. It does not handle episodes or models.
"""
