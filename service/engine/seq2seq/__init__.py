"""Runs encoder-decoder models with transformers, in a process of its own."""
