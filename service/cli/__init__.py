"""The `episodic` command: serve, rollout, episodes, export, keys, migrate, settings.

The top layer: may import everything. Commands that talk to a running service do so through `service.client`.
"""
