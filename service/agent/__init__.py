"""The agent: turns an observation into an action.

`agent.py` receives a read-only view of an episode and an observation, and returns a decision of the engine.
`policies.py` loads LoRA adapters and stores which ones are served. This package does not handle HTTP.
"""
