"""A learning run whose process is killed in each phase, and continued by the same command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.loop import state
from tests.client.fake_service import serve
from tests.learning.lesson import ENV
from tests.learning.loop_service import LoopService


@pytest.fixture
def fake() -> LoopService:
    return LoopService()


@pytest.fixture
def url(fake: LoopService) -> Iterator[str]:
    with serve(fake) as served:
        yield served


class Learning:
    """`episodic learn` as a process of its own."""

    def __init__(self, url: str, out: Path) -> None:
        arguments = ["--env", ENV, "--out", str(out), "--url", url, "--rounds", "1", "--json"]
        arguments += ["--episodes", "4", "--repeat", "2", "--selection", "40", "--final", "40"]
        command = [sys.executable, "-m", "tests.learning.lesson", "learn", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )

    def wait_for(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_true():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def interrupt(self) -> tuple[int, str]:
        """Does what Ctrl+C in a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def report(self) -> Any:
        output, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
        return json.loads(output)


def phase(out: Path) -> str:
    try:
        return json.loads((out / state.STATE).read_text())["phase"]
    except FileNotFoundError:
        return ""


PHASES = ("rollout", "export", "train", "load", "select", "decide", "final")
GATES = {
    "rollout": "/act",
    "export": "/export",
    "load": "/policy/out",
    "select": "/act",
    "decide": "/policy/out",
    "final": "/act",
}
"""The path of the call in which each phase is cut."""


def test_a_run_that_is_killed_in_each_phase_continues_without_repeating_complete_ones(
    fake: LoopService, url: str, tmp_path: Path
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "SKILLS").write_text("[1.0]")
    done: dict[str, Any] = {}
    for name in PHASES:
        fake.hold(GATES.get(name), when=lambda name=name: name in phase(out))
        (out / "WAIT").touch() if name == "train" else None
        learning = Learning(url, out)
        calls = out / "round-1" / "calls"
        learning.wait_for(lambda: calls.exists() if name == "train" else fake.is_held)  # noqa: B023
        assert name in phase(out)
        assert learning.end(signal.SIGKILL)[0] == -signal.SIGKILL
        (out / "WAIT").unlink(missing_ok=True)
        fake.release()
        stored = json.loads((out / state.STATE).read_text())["rounds"][0]
        assert all(stored[before] == result for before, result in done.items())  # nothing was repeated
        assert list(stored) == ["round", *PHASES[: PHASES.index(name)]][:7]
        done = {key: value for key, value in stored.items() if key != "round"}
    found = Learning(url, out).report()
    assert (found["final"]["verdict"], found["rounds"][0]["decide"]) == ("better", {"promoted": True})
    assert fake.aliases == {"out": found["best"]["policy"]}
    assert (
        len((out / "round-1" / "calls").read_text().splitlines()) == 2
    )  # the training that was cut, and its repetition
    for label, num_episodes in (("round-1", 8), ("selection-1", 80), ("final", 80)):
        runs = {tag for e in fake.tagged(label) for tag in e.fields["tags"] if tag.startswith("run:")}
        assert len(runs) > num_episodes // 80 + 1  # the rollout that was cut had another run id
    used = {one["run_id"] for one in found["final"]["rollouts"]}
    played = [e for e in fake.tagged("final") if any(f"run:{one}" in e.fields["tags"] for one in used)]
    assert len(played) == 80


def test_a_killed_run_takes_its_training_along(url: str, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "SKILLS").write_text("[1.0]")
    (out / "WAIT").touch()
    learning = Learning(url, out)
    pid = out / "round-1" / "pid"
    learning.wait_for(pid.exists)
    learning.end(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _is_running(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(("name", "number"), [("rollout", signal.SIGTERM), ("train", signal.SIGINT)])
def test_a_run_that_is_stopped_says_how_to_continue(
    name: str, number: int, fake: LoopService, url: str, tmp_path: Path
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "SKILLS").write_text("[1.0]")
    (out / "WAIT").touch()
    fake.hold(GATES.get(name), when=lambda: name in phase(out))
    learning = Learning(url, out)
    learning.wait_for(lambda: fake.is_held if name == "rollout" else (out / "round-1" / "pid").exists())
    threading.Timer(0.5, fake.release).start()
    code, errors = learning.end(number)
    assert "Traceback" not in errors
    assert code == 130
    assert "Stopped. Continue with:" in errors
    assert "--rounds 1 --json" in errors


def test_ctrl_c_sends_the_training_one_signal(url: str, tmp_path: Path):
    """After the first signal the training writes a checkpoint. The second one would prevent this."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "SKILLS").write_text("[1.0]")
    (out / "WAIT").touch()
    learning = Learning(url, out)
    learning.wait_for((out / "round-1" / "pid").exists)
    code, errors = learning.interrupt()
    assert code == 130, errors
    assert (out / "round-1" / "signals").read_text() == "SIGTERM\n"
