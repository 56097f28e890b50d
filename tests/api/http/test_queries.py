"""Queries are as strict as bodies: a parameter that a call does not have, or has twice, is refused by name."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams

from service.api.http.routing import check_query
from service.app import create_app
from service.engine.tokenizer import HFTokenizer
from service.errors import Unprocessable
from service.settings import Settings
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve

CALLS = [
    (method, route.path)
    for route in create_app(Settings(), store=MemoryStore()).routes
    if isinstance(route, APIRoute)
    for method in route.methods
]


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


def place(answer: Any) -> list[str]:
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), answer.text
    return answer.json()["errors"][0]["loc"]


async def test_an_unknown_parameter_is_refused_on_every_call(api: Served):
    assert CALLS
    for method, path in CALLS:
        answer = await api.client.request(method, path.format(episode_id="e", name="n"), params={"nonsense": "1"})
        assert place(answer) == ["query", "nonsense"], (method, path)
        assert "query parameter 'nonsense': unknown parameter" in answer.json()["detail"]


async def test_the_refusal_names_the_parameters_that_a_call_has(api: Served):
    answer = await api.client.get("/export?limit=3&formt=tokens")
    assert place(answer) == ["query", "limit"]
    assert "format" in answer.json()["detail"]
    answer = await api.client.get("/export?formt=tokens")
    assert "Did you mean 'format'?" in answer.json()["detail"]
    answer = await api.client.get("/profile?limit=3")
    assert "This call has no query parameters." in answer.json()["detail"]


@pytest.mark.parametrize(
    "query", ["Limit=1", "limit%00=1", "=1", "limit[]=1", "%ff%fe=1", "limit=1&limit=2", "tag=a&tag=b"]
)
async def test_a_parameter_that_would_be_ignored_is_refused(api: Served, query: str):
    assert place(await api.client.get(f"/episode?{query}"))[0] == "query"


async def test_a_filter_by_any_key_takes_every_key_but_the_empty_one():
    check_query(QueryParams("metadata.a=1&metadata.b.c=2&limit=1"), ["limit", "metadata.KEY"])
    for query in ("metadata.=1", "metadata=1", "metadat.a=1"):
        with pytest.raises(Unprocessable):
            check_query(QueryParams(query), ["limit", "metadata.KEY"])
