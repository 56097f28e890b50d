"""The vLLM engine. The only modules that import vLLM or torch, and they do so inside functions."""
