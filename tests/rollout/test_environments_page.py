"""Runs the examples of docs/environments.md in their order, against the service with a scripted engine."""

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from service.engine.tokenizer import HFTokenizer
from service.rollout import Report, Summary
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import serve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environments.md").read_text()
EPISODIC = f"{sys.executable} -c 'from service.cli.main import app; app()'"


async def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    ran = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=200, cwd=folder, env=environment
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def exported(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*.ndjson")
    return [json.loads(line)["episode"] for line in file.read_text().splitlines()]


async def test_the_examples_run(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """The commands play, and the blocks before them are the user's file. The last block is a program.

    The export command that the last rollout prints exports its episodes, and no others.
    """
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "python", "sh", "python"]
    outputs: list[str] = []
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        for language, block in blocks:
            script = f"export EPISODIC_URL={api.url}\n{block}" if language == "sh" else block
            if language == "sh":
                outputs.append(await run(["bash", "-ec", script.replace(".venv/bin/episodic", EPISODIC)], tmp_path))
            elif "play_vector" in block:
                program = script.replace("Client()", f"Client({api.url!r})")
                outputs.append(await run([sys.executable, "-c", program], tmp_path))
            else:
                with (tmp_path / "number.py").open("a") as file:
                    file.write(script)
        _, plain, with_text, vector = outputs
        (export,) = re.findall(r"^  episodic (export .*)", with_text, re.MULTILINE)
        await run(["bash", "-ec", f"{EPISODIC} {export}"], tmp_path)
    assert "The success of 4 of 4 episodes is unknown" in plain
    assert "unknown" not in with_text
    assert vector.startswith("returns [")
    episodes = exported(tmp_path)
    assert len(episodes) == 4
    assert {episode["instructions"] for episode in episodes} == {"Move the number to 0. Actions: less, more."}
    assert {episode["metadata"]["env"] for episode in episodes} == {"Number-v0"}
    assert all(episode["success"] in (True, False) for episode in episodes)


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
