"""`make learn` and the corrections: their options, the service that they use, and Ctrl+C. tests/e2e/test_adapters.py
learns a smaller game with the real engine."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.client import Client
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.client.fake_service import serve
from tests.e2e.server import until
from tests.learning.loop_service import LoopService
from tests.support import serving as scripted
from training import corrections, learn, ratings
from training.learn import INTERRUPTED, LESSON, running_service, schedule

NOWHERE = "http://127.0.0.1:9"


def test_the_options_of_the_lesson_are_accepted(tmp_path: Path):
    options = [*schedule(6), *LESSON]
    done = CliRunner().invoke(app, ["learn", *options, "--out", str(tmp_path / "out"), "--url", NOWHERE])
    assert "no service answers" in " ".join(done.stderr.split())
    assert done.exit_code == 1


def test_a_short_lesson_is_the_beginning_of_the_whole_one():
    assert schedule(12)[-1] == "4"
    assert schedule(1)[-1] == "8"
    assert float(schedule(6)[-1]) == pytest.approx(8 - 5 * 4 / 11, abs=0.01)


def test_the_options_of_the_corrections_are_accepted(tmp_path: Path):
    export = tmp_path / "export.ndjson"
    export.touch()
    done = CliRunner().invoke(app, ["train", *corrections.TRAIN, "--from", str(export), "--out", str(tmp_path / "out")])
    assert "is empty" in " ".join(done.stderr.split())
    assert done.exit_code == 1


def test_a_named_service_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_URL", NOWHERE)
    with running_service(tmp_path) as url:
        assert url == NOWHERE
    assert not list(tmp_path.iterdir())


def test_a_service_that_does_not_start_is_reported(tmp_path: Path):
    without = {name: value for name, value in os.environ.items() if not name.startswith("EPISODIC_")}
    done = subprocess.run(
        [sys.executable, "-m", "training.learn", "--out", tmp_path / "out"],
        env={**without, "EPISODIC_MODEL": str(tmp_path / "no-model")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"The service did not start. The end of {tmp_path}/out/server.log says why." in done.stderr
    assert "no-model" in (tmp_path / "out" / "server.log").read_text()


def test_ctrl_c_ends_the_run_and_says_how_to_continue(tmp_path: Path):
    fake = LoopService()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mastered.ndjson").touch()
    with serve(fake) as url:
        fake.hold("/policy", lambda: True)
        command = [sys.executable, "-m", "training.learn", "--out", str(tmp_path / "out")]
        environment = {**os.environ, "EPISODIC_URL": url}
        run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        until(lambda: fake.is_held)
        os.killpg(run.pid, signal.SIGINT)
        _, printed = run.communicate(timeout=60)
        fake.release()
    assert run.returncode == INTERRUPTED
    assert "`make learn` also continues the run" in printed


async def test_the_mastered_games_are_played_once(
    tokenizer: HFTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(learn, "MASTERED", {"CliffWalking-v1": 1, "Blackjack-v1": 2})
    async with scripted.serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        file = await asyncio.to_thread(learn.rehearsal, tmp_path, api.url)
    played = [json.loads(line)["episode"]["metadata"]["env"] for line in file.read_text().splitlines()]
    assert sorted(played) == ["Blackjack-v1", "Blackjack-v1", "CliffWalking-v1"]
    assert learn.rehearsal(tmp_path, NOWHERE) == file  # a run that continues does not play again


async def test_the_teacher_corrects_about_half_of_the_actions(tokenizer: HFTokenizer, tmp_path: Path):
    env = gymnasium.make(corrections.ENV)
    best = corrections.best_moves(env)
    assert best[:4] == [0, 3, 3, 3]  # the known best moves of the first row: left, then up

    def taught(url: str) -> list[dict[str, Any]]:
        with Client(url) as client:
            for seed in range(8):
                corrections.play(client, env, best, seed, "taught")
            return [step for document in client.export("steps", tag="taught") for step in document["steps"]]

    async with scripted.serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        steps = await asyncio.to_thread(taught, api.url)
    recorded = [step for step in steps if step["finish_reason"] == "recorded"]
    assert 0.25 < len(recorded) / len(steps) < 0.75
    for step in recorded:
        row, column = step["observation"].splitlines()[-1].removeprefix("row ").split(", column ")
        assert step["action"] == ("left", "down", "right", "up")[best[4 * int(row) + int(column)]]


async def test_the_rater_rates_what_forks_tried(tokenizer: HFTokenizer, tmp_path: Path):
    env = gymnasium.make(ratings.ENV)
    values = corrections.action_values(env)
    assert ratings.rating(values[0], 0) == 5
    assert {ratings.rating(values[15], action) for action in range(4)} == {5}  # the goal: all are equal

    def rated(url: str) -> list[dict[str, Any]]:
        with Client(url) as client:
            for seed in range(3):
                ratings.play(client, env, values, seed, "rated")
            return list(client.export("steps", tag="rated"))

    async with scripted.serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        exported = await asyncio.to_thread(rated, api.url)
    forks = [document for document in exported if document["episode"]["parent"]]
    groups = Counter(document["episode"]["group"] for document in forks)
    assert set(groups.values()) == {ratings.NUM_FORKS}
    assert len(groups) == sum(len(document["steps"]) for document in exported if not document["episode"]["parent"])
    for document in forks:
        last = document["steps"][-1]
        row, column = last["observation"].splitlines()[-1].removeprefix("row ").split(", column ")
        state = 4 * int(row) + int(column)
        expected = ratings.rating(values[state], ("left", "down", "right", "up").index(last["action"]))
        assert [one["rating"] for one in document["feedback"]] == [expected]


def test_the_options_of_the_ratings_are_accepted(tmp_path: Path):
    export = tmp_path / "export.ndjson"
    export.touch()
    done = CliRunner().invoke(app, ["train", *ratings.TRAIN, "--from", str(export), "--out", str(tmp_path / "out")])
    assert "is empty" in " ".join(done.stderr.split())
