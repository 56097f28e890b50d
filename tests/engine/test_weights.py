"""The version of the weights: it covers every byte, and unchanged files are read once."""

import os
import time
from pathlib import Path

import pytest

from service.engine import weights
from service.engine.weights import weights_version

MIDDLE = 2 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (made / name).write_bytes(bytes(2 * MIDDLE))
        os.utime(made / name, (1e9, 1e9))
    return made


def change(file: Path, place: int = MIDDLE) -> None:
    with file.open("r+b") as content:
        content.seek(place)
        content.write(b"x")


def test_a_change_in_the_middle_of_a_file_changes_the_version(folder: Path):
    before = weights_version(folder)
    change(folder / "model-2.safetensors")
    assert weights_version(folder) != before


def test_names_and_formats_count(folder: Path, tmp_path: Path):
    before = weights_version(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert weights_version(folder) == before, "vLLM reads only one format"
    (folder / "model-2.safetensors").rename(folder / "model-3.safetensors")
    assert weights_version(folder) != before
    older = tmp_path / "older"
    older.mkdir()
    assert weights_version(older) is None
    (older / "pytorch_model.bin").write_bytes(b"x")
    assert weights_version(older) is not None


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weights, "_SETTLED_S", -1)
    cache = tmp_path / "data" / "weights.json"
    first = weights_version(folder, cache)
    read: list[Path] = []
    opened = Path.open

    def recorded(self: Path, *args: object, **options: object) -> object:
        if self.suffix == ".safetensors":
            read.append(self)
        return opened(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", recorded)
    assert weights_version(folder, cache) == first
    assert read == []
    change(folder / "model-1.safetensors")
    read.clear()
    assert weights_version(folder, cache) != first
    assert [file.name for file in read] == ["model-1.safetensors"]


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, tmp_path: Path):
    """It could change again within the resolution of its time stamp."""
    cache = tmp_path / "weights.json"
    now = time.time()
    os.utime(folder / "model-1.safetensors", (now, now))
    weights_version(folder, cache)
    assert "model-1" not in cache.read_text()
    assert "model-2" in cache.read_text()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_or_read_only_cache_costs_only_time(folder: Path, tmp_path: Path, content: str):
    cache = tmp_path / "weights.json"
    cache.write_text(content)
    assert weights_version(folder, cache) == weights_version(folder)
    assert weights_version(folder, tmp_path / "model-x" / ("n" * 300) / "weights.json") == weights_version(folder)
