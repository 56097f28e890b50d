"""Runs the migrations on the URL that SQLStore hands over, in one transaction: all or none of them take place."""

from typing import Any

from alembic import context
from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.pool import NullPool

from service.store.schema import metadata


def _leave_transactions_to_us(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Python's sqlite3 begins none before a statement that changes a table


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


_url: URL = context.config.attributes["url"]
_engine = create_engine(_url, poolclass=NullPool)
event.listen(_engine, "connect", _leave_transactions_to_us)
event.listen(_engine, "begin", _begin)
with _engine.begin() as _connection:
    context.configure(connection=_connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()
