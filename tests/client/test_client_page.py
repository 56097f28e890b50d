"""docs/client.md: every call with its parameters, every error, and examples that run."""

import asyncio
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import episodic
from episodic import Client, Episode, EpisodicError, Filters
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import serve

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
EXTENSIONS = {"client.run", "client.stream"}
"""Named on the page without their parameters."""


def calls_of(kind: type[Any]) -> dict[str, list[str]]:
    """The public methods, each with its parameters. Those that select episodes are called filters."""
    found: dict[str, list[str]] = {}
    for name, call in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_") and name not in ("advance", "close"):
            parameters = inspect.signature(call).parameters
            assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()), name
            own = [
                one for one in list(parameters)[1:] if one not in Filters.__annotations__ or "status" not in parameters
            ]
            found[f"{kind.__name__.lower()}.{name}"] = own + ["filters"] * ("status" in parameters)
    return found


def test_every_call_is_on_the_page_with_its_parameters() -> None:
    rows = re.findall(r"^\| `((?:client|episode)\.\w+)\((.*?)\)` \|", PAGE, re.MULTILINE)
    shown = {call: parameters.split(", ") if parameters else [] for call, parameters in rows}
    expected = {**calls_of(Client), **calls_of(Episode)}
    for call in EXTENSIONS:
        assert f"`{call}`" in PAGE
        del expected[call]
    assert shown == expected


def test_every_parameter_of_the_client_is_on_the_page() -> None:
    (parameters,) = re.findall(r"^`Client\((.*)\)`$", PAGE, re.MULTILINE)
    assert parameters.split(", ") == list(inspect.signature(Client).parameters)


def test_every_error_is_on_the_page() -> None:
    table = PAGE[PAGE.index("## Errors") :]
    shown = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    exported = [getattr(episodic, name) for name in episodic.__all__]
    errors = [kind.__name__ for kind in exported if inspect.isclass(kind) and issubclass(kind, EpisodicError)]
    assert sorted(shown) == sorted(errors)
    assert len(errors) > 10


async def test_the_examples_run(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 2
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        for example in examples:
            script = example.replace("http://127.0.0.1:8000", api.url)
            command = [sys.executable, "-c", script]
            ran = await asyncio.to_thread(
                subprocess.run,
                command,
                capture_output=True,
                text=True,
                timeout=120,
                env={**os.environ, "EPISODIC_URL": api.url},
            )
            assert ran.returncode == 0, ran.stderr
            assert ran.stdout
