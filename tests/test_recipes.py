"""Tests the recipes of CONTRIBUTING.md: applies each one to a copy of the tree, and uses the result over HTTP."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

PLAY_INTEGERS = """
    async with serve(folder, ScriptedEngine(tokenizer)) as api:
        await api.open(action_space={"type": "integer", "low": -1, "high": 3})
        acts = [await api.act() for _ in range(20)]
        assert all(act["action"] in range(-1, 4) for act in acts), acts
        assert set(acts[0]["action_probs"]) == {"-1", "0", "1", "2", "3"}
        recorded = await api.client.post("/episode/e/action", json={"observation": "x", "action": 2})
        assert recorded.json()["action"] == 2
        refused = await api.client.post("/episode/e/action", json={"observation": "x", "action": 9})
        assert refused.status_code == 422
        huge = {"action_space": {"type": "integer", "low": 0, "high": 10**6}}
        assert (await api.client.post("/episode", json=huge)).status_code == 422
"""
FILTER_BY_GOAL = """
    async with serve(folder, ScriptedEngine(tokenizer)) as api:
        await api.open("a", goal="win")
        await api.open("b", goal="lose")
        await api.open("c")
        listed = (await api.client.get("/episode", params={"goal": "win"})).json()["episodes"]
        assert [episode["episode_id"] for episode in listed] == ["a"]
        async with AsyncClient(api.url) as client:
            assert [episode.episode_id async for episode in client.episodes(goal="lose")] == ["b"]
        command = [sys.executable, "-m", "service", "episodes", "--goal", "win", "--json", "--url", api.url]
        printed = await asyncio.to_thread(subprocess.check_output, command, text=True)
        assert '"episode_id":"a"' in printed and printed.count("episode_id") == 1, printed
"""
PLAY_UNIFORMLY = """
    async with serve(folder, None, model="uniform") as api:
        await api.open(instructions="Play.", action_space={"type": "discrete", "actions": ["left", "right"]})
        act = await api.act(observation="at the door")
        assert act["action_probs"] == {"left": 0.5, "right": 0.5}
        await api.act(observation="in the hall")
        (fork,) = (await api.client.post("/episode/e/fork", json={"n": 1})).json()["episodes"]
        await api.act(fork["episode_id"], observation="once more")
        segments = (await api.trajectory(fork["episode_id"], format="tokens"))["segments"]
        assert [segment["steps"] for segment in segments] == [[0], [1], [2]]
        given = bytes(segments[1]["encoder_token_ids"]).decode()
        assert given == f"Play.\\nat the door\\n{act['action']}\\nin the hall", given
        assert bytes(segments[0]["token_ids"]).decode() == act["action"]
        assert segments[0]["support"] == [{"kind": "filtered"}, *[None] * (len(act["action"]) - 1)], segments[0]
        refused = await api.client.post("/episode", json={"action_space": {"type": "text"}})
        assert refused.status_code == 422
"""
SCRIPT = """
import asyncio, subprocess, sys
from pathlib import Path
from transformers import AutoTokenizer
import service
from episodic import AsyncClient
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import serve

folder = Path(sys.argv[1])
assert str(folder) in service.__file__, service.__file__
tokenizer = HFTokenizer(AutoTokenizer.from_pretrained(Path(service.__file__).parent / "packaged/policies/toy-text"))

async def main():
"""


def steps_of(heading: str) -> dict[str, list[str]]:
    """Returns the hunks of a recipe by the path of the file that they change."""
    section = CONTRIBUTING.split(f"### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    found = re.findall(r"```diff (\S+)\n(.*?)```", section, re.DOTALL)
    return {path: text.split("@@\n") for path, text in found}


def apply(folder: Path, path: str, hunks: list[str]) -> None:
    """Applies the hunks to a file. The old lines must occur exactly once. Without old lines, the file is created."""
    file = folder / path
    for hunk in hunks:
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        if before:
            text = file.read_text()
            assert text.count(before) == 1, f"{path} must contain these lines exactly once:\n{before}"
            file.write_text(text.replace(before, after))
        else:
            assert not file.exists(), f"{path} already exists"
            file.write_text(after)


@pytest.mark.parametrize(
    ("heading", "use"),
    [
        ("Add an action space", PLAY_INTEGERS),
        ("Add a filter", FILTER_BY_GOAL),
        ("Add an engine", PLAY_UNIFORMLY),
    ],
)
def test_a_recipe_works_and_touches_at_most_four_files(tmp_path: Path, heading: str, use: str):
    steps = steps_of(heading)
    assert 1 <= len(steps) <= 4
    for package in ("service", "episodic"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path, hunks in steps.items():
        apply(tmp_path, path, hunks)
    script = f"{SCRIPT}{use}\nasyncio.run(main())"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "EPISODIC_DATA": str(tmp_path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    checked = [tmp_path / path for path in steps]
    lint = [sys.executable, "-m", "ruff", "check", "--quiet", "--config", str(ROOT / "pyproject.toml"), *checked]
    assert subprocess.run(lint, capture_output=True, text=True, cwd=tmp_path).returncode == 0
