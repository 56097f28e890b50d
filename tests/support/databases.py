"""Real databases: a PostgreSQL server for each test process, new databases, and SQL that bypasses the store."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
from sqlalchemy import Connection, make_url, text

from service.store.connections import Connections, Patience
from service.store.postgresql import PostgreSQLConnections
from service.store.sql import SQLStore
from service.store.sqlite import SQLiteConnections
from tests.support import postgres

_T = TypeVar("_T")
NewDatabase = Callable[..., str]


@pytest.fixture(scope="session")
def own_server() -> Iterator[postgres.Postgres]:
    """A PostgreSQL server that a test may stop and start."""
    if reason := postgres.missing():
        pytest.skip(reason)
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Iterator[NewDatabase]:
    """Creates a PostgreSQL database, and returns its URL. The argument is the name of the database to copy, if any."""
    if postgres.TEST_URL is None:
        yield request.getfixturevalue("own_server").new
        return
    server = postgres.Foreign(postgres.TEST_URL)
    yield server.new
    server.close()


@pytest.fixture(scope="session")
def new_store(new_database: NewDatabase) -> NewDatabase:
    """Creates an empty store in PostgreSQL, and returns its URL. Copies one, because migrations take long."""
    url = new_database()
    asyncio.run(_migrate(url))
    return lambda: new_database(make_url(url).database)


async def _migrate(url: str) -> None:
    async with SQLStore(url):
        pass


async def in_database(url: str, function: Callable[[Connection], _T]) -> _T:
    """Runs the function in its own transaction, without the store."""
    kind = SQLiteConnections if url.startswith("sqlite") else PostgreSQLConnections
    connections: Connections = kind(make_url(url), Patience())
    try:
        return await connections.write(function)
    finally:
        await connections.close()


async def execute(url: str, statement: str) -> None:
    await in_database(url, lambda connection: connection.execute(text(statement)))


@asynccontextmanager
async def without_table(url: str, table: str) -> AsyncIterator[None]:
    """Hides one of the store's tables: inside the context, the store cannot use it."""
    await execute(url, f"ALTER TABLE {table} RENAME TO hidden")
    yield
    await execute(url, f"ALTER TABLE hidden RENAME TO {table}")
