"""Runs the README's curl lines and its Python loop against the real server."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.server import Server

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_curl_lines_work_in_their_order(server: Server) -> None:
    (script,) = blocks("sh")
    script = script.replace("127.0.0.1:8000", server.url).replace("curl -s ", "curl -sS --fail-with-body ")
    ran = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '"done":true' in ran.stdout
    assert '"loss_mask"' in ran.stdout


def test_the_python_loop_reaches_the_goal(server: Server) -> None:
    (script,) = blocks("python")
    script = script.replace("http://127.0.0.1:8000", server.url)
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert ran.returncode == 0, ran.stderr
    assert "return 1.0" in ran.stdout


def test_the_rollout_beats_the_random_policy(server: Server) -> None:
    import json

    command = [sys.executable, "-m", "service", "rollout", "--env", "episodic/FrozenLakeRandom-v0", "--episodes", "40"]
    options = ["--env-kwargs", '{"maps": "held_out"}', "--seed", "7", "--url", server.url, "--json"]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["completion_rate"] >= 0.9
    assert report["completion_rate"] > report["random"]["completion_rate"]
