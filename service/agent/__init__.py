"""The agent: from an observation to an action.

May import the engine's seam (`service.engine.base`). Does no HTTP and stores nothing: it gets a read-only view of an
episode and returns a decision.
"""
