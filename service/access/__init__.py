"""Who may call, and how much: API keys, quotas, and admission to the engine.

May import the store (keys are stored there), settings and errors. Knows nothing of episodes or models.
"""
