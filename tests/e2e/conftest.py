"""One server for all end-to-end tests. A test that kills it must start it again."""

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("e2e")).start()
    yield started
    if started.process is not None and started.process.poll() is None:
        started.kill()
