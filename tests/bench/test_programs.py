"""Every program of the benchmarks can be imported, and those that are short here also run."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in ("__init__", "__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_a_program_of_the_benchmarks_can_be_imported(name: str) -> None:
    importlib.import_module(f"bench.{name}")


def test_the_memory_of_idle_episodes_is_printed() -> None:
    command = [sys.executable, "-m", "bench.idle_memory", "--num-episodes", "64"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("64 idle episodes, ")
    assert "RSS grew by " in ran.stdout
