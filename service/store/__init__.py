"""Stores episodes durably in SQLite or PostgreSQL. An act is stored completely or not at all; concurrent acts share a
commit.

This package imports the values of `service.trajectory`, but nothing of the agent.
"""
