"""The HTTP tests run over a SQLite file and over a real PostgreSQL server."""

from collections.abc import Iterator

import pytest

from tests.support import serving

WITHOUT_A_STORE = ("test_body", "test_hostile", "test_openapi")
"""What these test happens before or beside the store."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.module.__name__.endswith(WITHOUT_A_STORE):
        kinds = [mark.args[0] for mark in metafunc.definition.iter_markers("store")] or ["sqlite", "postgresql"]
        metafunc.parametrize("database", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kind of store that services keep their episodes in."""
    kind = getattr(request, "param", "sqlite")
    if kind == "postgresql":
        serving.new_store = request.getfixturevalue("new_database")
    yield kind
    serving.new_store = None
