"""Every program of the benchmarks can be imported, and those that are short here also run."""

import importlib
import json
import os
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


def test_the_operations_of_a_large_store_read_no_whole_table() -> None:
    command = [sys.executable, "-m", "bench.large_store", "--steps", "20000", "--length", "10"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "append a step" in ran.stdout
    assert "0 read a whole table" in ran.stdout


BURN = """
import logging, os, signal, time
logger = logging.getLogger("burn")
logger.addHandler(logging.NullHandler())
os.kill(os.getpid(), signal.SIGUSR1)
end = time.thread_time() + 0.3
while time.thread_time() < end:
    logger.error("once more")
os.kill(os.getpid(), signal.SIGUSR2)
"""


def test_the_sampler_counts_the_part_that_uses_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "burn.py").write_text(BURN)
    output = tmp_path / "counts.json"
    command = [sys.executable, "-m", "bench.sampler", str(output), "burn"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    subprocess.run(command, env=environment, check=True, timeout=60, cwd=tmp_path)
    found = json.loads(output.read_text())
    assert max(found["counts"], key=found["counts"].get) == "logs"
    assert found["main_s"] >= 0.3
