"""Episodes and their state: who acts on which step, what is a retry, what is committed, when an episode ends.

May import the agent, access control and the store. Knows nothing of HTTP.
"""
