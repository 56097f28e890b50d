"""Durable episodes: one act is one transaction, and concurrent acts share a commit."""
