"""Error details: a clean sentence, without a file path, a time stamp or a line of a library."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from tests.api.routes.test_openai import EchoEngine
from tests.support.serving import Served, serve

INTERNALS = re.compile(r"\.(cc|cpp|py|h|rs)\b|\d\d:\d\d:\d\d|0x[0-9a-f]{4}|Traceback|/[a-z]+/[a-z]+/|\n")


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, EchoEngine(tokenizer), adapters=tmp_path) as served:
        yield served


def tool(**parameters: Any) -> dict[str, Any]:
    return {"type": "tools", "tools": [{"name": "push", "parameters": {"type": "object", "properties": parameters}}]}


@pytest.mark.parametrize(
    "space",
    [
        {"type": "regex", "pattern": "("},
        {"type": "json", "schema": {"type": "strin"}},
        {"type": "json", "schema": {"pattern": "("}},
        {"type": "json", "schema": {"$ref": "http://localhost/x"}},
        tool(branch={"type": "string", "pattern": "("}),
        {"type": "nothing"},
        [],
    ],
    ids=str,
)
async def test_a_refused_action_space_has_a_clean_detail(api: Served, space: Any):
    answer = await api.client.post("/episode", json={"action_space": space})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), answer.text
    detail = answer.json()["detail"]
    assert detail
    assert not INTERNALS.search(detail), detail


@pytest.mark.parametrize("path", ["nowhere", "../..", "/etc/passwd", "a\0b", ".", "x" * 1000])
async def test_a_refused_adapter_has_a_clean_detail(api: Served, path: str):
    answer = await api.client.put("/policy/mine", json={"path": path})
    assert answer.status_code == 422, answer.text
    assert str(Path.cwd()) not in answer.text
    assert not INTERNALS.search(answer.json()["detail"].replace(path, "")), answer.text
