"""Runs the migrations on the URL that SQLStore hands over, in a connection of their own."""

from alembic import context
from sqlalchemy import URL, create_engine
from sqlalchemy.pool import NullPool

from service.store.schema import metadata

_url: URL = context.config.attributes["url"]
with create_engine(_url, poolclass=NullPool).begin() as _connection:
    context.configure(connection=_connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
