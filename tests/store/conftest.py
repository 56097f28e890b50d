"""The store under test: in memory, in a SQLite file, and in a database on a real PostgreSQL server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.store.base import Store
from service.store.sql import SQLStore
from service.testing.memory_store import MemoryStore


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, once for each kind of database."""
    if request.param == "postgresql":
        return request.getfixturevalue("new_database")()
    return f"sqlite:///{tmp_path}/episodic.db"


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store, once for each kind."""
    opened: Store = MemoryStore()
    if request.param == "sqlite":
        opened = SQLStore(f"sqlite:///{tmp_path}/db")
    elif request.param == "postgresql":
        opened = SQLStore(request.getfixturevalue("new_database")())
    await opened.open()
    yield opened
    await opened.close()
