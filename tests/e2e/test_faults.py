"""One round with each fault on the real engine; the checker finds nothing. `make faults` runs hundreds of rounds."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.server import Server
from tests.faults.campaign import Plan, run
from tests.faults.player import NUM_MOVES
from tests.faults.stand import SETTINGS, FaultKind, Stand
from tests.support.postgres import missing, running

NUM_EPISODES = 32


def loses_nothing(stand: Stand, kind: FaultKind, store: str, seed: int) -> None:
    verdict = run(stand, Plan(kind, store, seed, num_rounds=1, num_episodes=NUM_EPISODES))
    assert verdict.findings == []
    assert verdict.num_faults == 1
    assert verdict.num_acts > NUM_EPISODES * (NUM_MOVES - 1)
    assert verdict.num_retried > 0, "the fault happened under load"


def test_an_engine_that_is_hurt_loses_and_doubles_nothing(server: Server) -> None:
    """test_crash.py tests kill -9 of the whole server."""
    loses_nothing(Stand([server]), "engine", "sqlite", seed=1)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    if reason := missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        database = stack.enter_context(running())
        folder: Path = tmp_path_factory.mktemp("replicas")
        url = database.create("faults")
        stand = Stand([Server(folder / name, store=url, **SETTINGS) for name in "ab"], database)
        stack.callback(stand.kill)
        yield stand.start()


@pytest.mark.parametrize("kind", ["postgres", "replicas"])
def test_two_replicas_on_one_database_lose_and_double_nothing(replicas: Stand, kind: FaultKind) -> None:
    loses_nothing(replicas, kind, "postgresql", seed=1)
