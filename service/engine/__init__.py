"""Runs the model. `base` defines the interface of an engine, and `vllm` implements it.

Only this package handles tokens, chat templates, grammars and model runtimes. It imports the packages of validation and
observability, and the modules that everything shares, such as `service.trajectory`.
"""
