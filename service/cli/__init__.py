"""The `episodic` command: serve, doctor, rollout, episodes, export, train, keys, migrate, settings.

This is the top layer: it may import every other package. Commands that call a running service use `service.client`.
"""
