"""Runs the HTTP tests on a SQLite file and on a real PostgreSQL server."""

import pytest

from tests.support import serving

WITHOUT_A_STORE = (
    "test_body",
    "test_connections",
    "test_documentation",
    "test_hostile",
    "test_openapi",
    "test_queries",
    "test_shutdown",
)
"""Modules that test nothing of the store. They run once, on SQLite."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.module.__name__.endswith(WITHOUT_A_STORE):
        kinds = [mark.args[0] for mark in metafunc.definition.iter_markers("store")] or ["sqlite", "postgresql"]
        metafunc.parametrize("database", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def database(request: pytest.FixtureRequest) -> str:
    """The kind of store that the services of a test use: "sqlite" or "postgresql"."""
    return getattr(request, "param", "sqlite")


@pytest.fixture(autouse=True)
def _serve_on(database: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if database == "postgresql":
        monkeypatch.setattr(serving, "new_store", request.getfixturevalue("new_store"))
