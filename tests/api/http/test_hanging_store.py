"""A store that does not respond: calls that need it wait or are refused, all others are served."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support import postgres
from tests.support.serving import Served, serve

pytestmark = pytest.mark.store("postgresql")
"""SQLite reads a local file: it can fail, but it does not hang."""


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer, own_server: postgres.Postgres) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served
        own_server.resume()


async def test_readiness_says_so_and_health_does_not(api: Served, own_server: postgres.Postgres):
    assert (await api.client.get("/readyz")).status_code == 200
    own_server.pause()
    unready = await api.client.get("/readyz")
    assert (unready.status_code, unready.json()["reason"]) == (503, "store_unavailable")
    assert (await api.client.get("/healthz")).status_code == 200
    own_server.resume()
    assert (await api.client.get("/readyz")).status_code == 200


async def test_an_act_is_committed_once_the_store_answers_again(api: Served, own_server: postgres.Postgres):
    await api.open()
    own_server.pause()
    acting = asyncio.create_task(api.post_act(step=0))
    await asyncio.sleep(0.3)
    assert not acting.done(), "the answer was sent before the commit"
    own_server.resume()
    answer = await acting
    assert answer.status_code == 200, answer.text
    assert len((await api.trajectory())["steps"]) == 1
