"""Durable episodes in SQLite or PostgreSQL. One act is one transaction, and concurrent acts share a commit.

May import the values of `service.trajectory` and nothing of the agent.
"""
