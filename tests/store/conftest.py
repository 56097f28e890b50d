"""The stores under test: in memory, a SQLite file, a database of a real PostgreSQL server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import postgres

NewDatabase = Callable[[], str]


@pytest.fixture(scope="session")
def own_server() -> Iterator[postgres.Postgres]:
    """A PostgreSQL server that a test may stop and start."""
    if reason := postgres.missing():
        pytest.skip(reason)
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Iterator[NewDatabase]:
    """Makes an empty PostgreSQL database, and says its URL."""
    if postgres.TEST_URL is None:
        yield request.getfixturevalue("own_server").new
        return
    server = postgres.Foreign(postgres.TEST_URL)
    yield server.new
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind that lasts, empty."""
    if request.param == "postgresql":
        return request.getfixturevalue("new_database")()
    return f"sqlite:///{tmp_path}/episodic.db"
