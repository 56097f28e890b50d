"""Episodes and their state: the order of steps, retries, conflicts, commits and idle expiry.

This package may import the agent, access control and the store. It does not handle HTTP.
"""
