"""Runs the migrations on the URL that SQLStore hands over, in a connection of their own."""

import asyncio

from alembic import context
from sqlalchemy import Connection, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from service.store.schema import metadata


def _run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


def _migrate_sqlite(url: URL) -> None:
    """Without asyncio: aiosqlite's thread outlives a loop in which it could not open the file."""
    engine = create_engine(url.set(drivername="sqlite"), poolclass=NullPool)
    with engine.begin() as connection:
        _run(connection)


async def _migrate(url: URL) -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(_run)
    finally:
        await engine.dispose()


_url: URL = context.config.attributes["url"]
if _url.get_backend_name() == "sqlite":
    _migrate_sqlite(_url)
else:
    asyncio.run(_migrate(_url))
