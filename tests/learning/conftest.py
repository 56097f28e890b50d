"""A tiny model, and a player whose episodes have exact log-probabilities."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.weights import weights_version
from tests.support.trajectories import Player, make_model, write


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """The model is so small that threads only wait for each other, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # of processes that a test starts
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_version(tiny: Path) -> str:
    version = weights_version(tiny)
    assert version is not None
    return version[:12]


@pytest.fixture(scope="session")
def lessons(tiny: Path, tiny_version: str) -> list[Any]:
    """24 episodes of one seed. The return is the number of times that the first action was taken."""
    player = Player(tiny, tiny_version)
    documents = [player.play(f"e{number}", num_steps=4) for number in range(24)]
    for document in documents:
        document["feedback"] = [{"step": None, "rating": 1 + document["episode"]["episode_return"]}]
    return documents


@pytest.fixture
def export(lessons: list[Any], tmp_path: Path) -> Path:
    return write(lessons, tmp_path / "export.ndjson")


@pytest.fixture
def player(tiny: Path, tiny_version: str) -> Player:
    return Player(tiny, tiny_version)
