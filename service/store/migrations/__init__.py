"""Alembic's migrations of the SQL store, applied by SQLStore.open."""
