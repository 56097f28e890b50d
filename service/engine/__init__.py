"""The model behind the agent. `base` is the seam; a model runtime (`vllm`) stands behind it.

Only this package knows tokens, chat templates, grammars and model runtimes. May import validation, observability and
the values of `service.trajectory`.
"""
