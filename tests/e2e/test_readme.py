"""Runs the shell and Python examples of the README, the quickstart and docs/training.md against the real server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import Server

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
README, QUICKSTART, TRAINING = ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "training.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def shell(script: str, server: Server, folder: Path) -> str:
    script = script.replace("127.0.0.1:8000", server.url.removeprefix("http://")).replace(".venv/bin/", f"{BIN}/")
    script = re.sub(r"curl -sS(N?) ", r"curl -sS\1 --fail-with-body ", script)
    environment = {**os.environ, "EPISODIC_URL": server.url}
    ran = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, timeout=200, cwd=folder, env=environment
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def python(script: str, server: Server) -> str:
    script = script.replace("http://127.0.0.1:8000", server.url)
    environment = {**os.environ, "EPISODIC_URL": server.url}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_readmes_shell_lines_work_in_their_order(server: Server, tmp_path: Path) -> None:
    rollout, opened, walk, end = (shell(script, server, tmp_path) for script in blocks(README, "sh"))
    assert "1.000" in next(line for line in rollout.splitlines() if "completion rate" in line)
    assert json.loads(opened)["profile"] == "frozen-lake"
    acts = [json.loads(document) for document in walk.replace("}{", "}\n{").splitlines()]
    (expected,) = [json.loads(answer) for answer in blocks(README, "json")]
    for name in ("action_probs", "logprob"):
        assert acts[-1][name] == pytest.approx(expected.pop(name), abs=1e-3)
    assert {name: acts[-1].get(name) for name in expected} == expected
    assert '"done":true' in end
    assert '"loss_mask"' in end


def test_the_readmes_python_lines_work(server: Server) -> None:
    (loop,) = (python(script, server) for script in blocks(README, "python"))
    assert "return 1.0 success True" in loop


def test_the_quickstarts_lines_work(server: Server, tmp_path: Path) -> None:
    rollout, talk = (shell(script, server, tmp_path) for script in blocks(QUICKSTART, "sh"))
    assert "CliffWalking-v1" in rollout
    assert "event: text" in talk
    assert "event: act" in talk
    around, vector, chat = (python(script, server) for script in blocks(QUICKSTART, "python"))
    assert around.endswith("episodes 2\n")
    assert vector.count("-13.0") >= 8
    assert chat.startswith("chat ")


def test_the_training_page_loads_what_was_played(server: Server, tmp_path: Path) -> None:
    _, table = (shell(commands, server, tmp_path) for commands in blocks(TRAINING, "sh"))
    assert "toy-text" in table
    assert len((tmp_path / "trajectories.ndjson").read_text().splitlines()) == 8
    tokens, chats, masked = (python(script, server) for script in blocks(TRAINING, "python") if "Client" in script)
    assert "input_ids" in tokens
    assert "system" in chats
    assert "labels" in masked


def test_the_rollout_beats_the_random_policy(server: Server) -> None:
    command = [sys.executable, "-m", "service", "rollout", "--env", "episodic/FrozenLakeRandom-v0", "--episodes", "40"]
    options = ["--env-kwargs", '{"maps": "held_out"}', "--seed", "7", "--url", server.url, "--json"]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["completion_rate"] >= 0.9
    assert report["completion_rate"] > report["random"]["completion_rate"]
