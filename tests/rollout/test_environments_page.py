"""Runs the examples of docs/environments.md in their order, against the service with a scripted engine."""

import asyncio
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

from service.engine.tokenizer import HFTokenizer
from service.rollout import Report, Summary
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import serve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environments.md").read_text()


async def test_the_examples_run(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """The commands play, and the blocks before them are the user's file. The last block is a program."""
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "python", "sh", "python"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    outputs: list[str] = []
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        for language, block in blocks:
            script = block.replace("http://127.0.0.1:8000", api.url)
            if language == "python" and "play_vector" not in block:
                with (tmp_path / "number.py").open("a") as file:
                    file.write(script)
                continue
            script = script.replace(
                ".venv/bin/episodic", f"{sys.executable} -c 'from service.cli.main import app; app()'"
            )
            command = ["bash", "-ec", script] if language == "sh" else [sys.executable, "-c", script]
            ran = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
            outputs.append(ran.stdout)
        described = (await api.client.get("/episode", params={"limit": 100})).json()["episodes"]
    _, plain, with_text, vector = outputs
    assert "The success of 4 of 4 episodes is unknown" in plain
    assert "unknown" not in with_text
    assert vector.startswith("returns [")
    assert "Move the number to 0. Actions: less, more." in {episode["instructions"] for episode in described}


def test_the_page_names_every_option_of_the_command() -> None:
    command = subprocess.run(
        [sys.executable, "-m", "service", "rollout", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    )
    options = set(re.findall(r"(--[a-z][a-z-]+)", command.stdout)) - {"--help", "--url", "--concurrency"}
    assert len(options) > 10
    for option in options:
        assert f"{option}" in PAGE, option


def test_the_page_names_every_key_of_the_report() -> None:
    table = PAGE[PAGE.index("### JSON report") : PAGE.index("## Your own environment")]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    shown = [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]
    keys = {field.name for kind in (Report, Summary) for field in dataclasses.fields(kind)}
    assert sorted(shown) == sorted(keys - {"policy"} | {"export_command"})
