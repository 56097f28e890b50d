"""A store that answers nothing: what needs it waits or is refused, and what does not need it is served."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support import postgres
from tests.support.serving import Served, serve

pytestmark = pytest.mark.store("postgresql")
"""A SQLite file is on this machine: it fails, or answers."""


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
    assert not acting.done(), "no answer leaves before the commit"
    own_server.resume()
    answer = await acting
    assert answer.status_code == 200, answer.text
    assert len((await api.trajectory())["steps"]) == 1
