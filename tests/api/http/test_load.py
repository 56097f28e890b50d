"""Overload over real HTTP: which acts are refused, that they leave nothing behind, and who gets the next slot."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.access.keys import SCOPES, new_key
from service.engine.tokenizer import HFTokenizer
from tests.support.serving import HeldEngine, Served, serve, until

RUNNING, QUEUED = 2, 3


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    """A service with two slots and room for three waiting acts. Acts end when the test sets `engine.release`."""
    async with serve(tmp_path, HeldEngine(tokenizer), max_running_acts=RUNNING, max_queued_acts=QUEUED) as served:
        yield served
        served.engine.release.set()


async def fill(api: Served, headers: Any = None) -> "list[asyncio.Task[Any]]":
    """Starts as many acts as are admitted, each in its own episode."""
    acting: list[asyncio.Task[Any]] = []
    for number in range(RUNNING + QUEUED):
        await api.client.post("/episode", json={"episode_id": f"e{number}"}, headers=headers)
        acting.append(asyncio.create_task(api.post_act(f"e{number}", headers=headers)))
        await until(lambda number=number: api.app.state.services.sessions.admission._num_acts == number + 1)
    return acting


async def test_full_queue_returns_429_and_stores_nothing(api: Served):
    acting = await fill(api)
    assert api.engine.num_held == RUNNING
    await api.open("late")
    for headers in ({}, {"Accept": "text/event-stream"}):
        refused = await api.post_act("late", headers=headers, reward=None)
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.headers["Content-Type"] == "application/problem+json"
    recorded = await api.client.post("/episode/late/action", json={"observation": "look", "action": "x"})
    assert (recorded.status_code, recorded.json()["code"]) == (429, "overloaded")
    batch = await api.client.post("/act/batch", json={"acts": [{"episode_id": "late", "observation": "look"}]})
    assert (batch.status_code, batch.json()["code"]) == (429, "overloaded")
    api.engine.release.set()
    assert [answer.status_code for answer in await asyncio.gather(*acting)] == [200] * len(acting)
    assert (await api.get("late"))["step"] == 0
    assert (await api.act("late"))["step"] == 0


async def test_calls_without_engine_are_served_during_overload(api: Served):
    acting = await fill(api)
    assert (await api.get("e0"))["step"] == 0
    assert (await api.client.get("/readyz")).status_code == 200
    await api.open("late")
    assert (await api.client.post("/episode/late/end", json={})).status_code == 200
    metrics = (await api.client.get("/metrics")).text
    assert f"agent_running_acts {RUNNING:.1f}" in metrics
    assert f"agent_waiting_acts {QUEUED:.1f}" in metrics
    api.engine.release.set()
    await asyncio.gather(*acting)
    metrics = (await api.client.get("/metrics")).text
    assert "agent_running_acts 0.0" in metrics
    assert "agent_waiting_acts 0.0" in metrics


async def test_a_deadline_in_the_queue_is_504_and_frees_its_place(api: Served):
    acting = await fill(api)
    acting.pop().cancel()
    await until(lambda: api.app.state.services.sessions.admission._num_acts == RUNNING + QUEUED - 1)
    await api.open("late")
    late = await api.post_act("late", timeout_s=0.05)
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    assert api.engine.num_held == RUNNING, "the late act reached the engine"
    assert (await api.get("late"))["step"] == 0
    again = asyncio.create_task(api.post_act("late"))
    api.engine.release.set()
    assert (await again).status_code == 200
    await asyncio.gather(*acting)


async def test_a_deadline_in_the_engine_is_504_and_aborts_the_request(api: Served):
    await api.open("late")
    late = await api.post_act("late", timeout_s=0.05)
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    assert (api.engine.num_held, api.engine.num_aborted) == (1, 1)
    assert (await api.get("late"))["step"] == 0


async def test_batch_larger_than_the_queue_is_answered_completely(api: Served):
    names = [f"b{number}" for number in range(4 * (RUNNING + QUEUED))]
    for name in names:
        await api.open(name)
    acts = [{"episode_id": name, "observation": "look"} for name in names]
    batch = asyncio.create_task(api.client.post("/act/batch", json={"acts": acts}))
    await until(lambda: api.engine.num_held == RUNNING)
    api.engine.release.set()
    results = (await batch).json()["results"]
    assert [result["step"] for result in results] == [0] * len(names)


async def test_overload_by_one_tenant_does_not_block_another(api: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.access.keys._FRESH_S", 0.0)
    store = api.app.state.services.sessions.store
    headers = []
    for tenant in ("flood", "calm"):
        key, record = new_key(tenant, SCOPES, 1.0)
        await store.add_key(record)
        headers.append({"Authorization": f"Bearer {key}"})
    flooding = await fill(api, headers[0])
    assert (await api.client.post("/episode", json={"episode_id": "e"}, headers=headers[1])).status_code == 201
    calm = asyncio.create_task(api.post_act("e", headers=headers[1]))
    await until(lambda: api.app.state.services.sessions.admission._num_acts == RUNNING + QUEUED + 1)
    refused = await api.post_act("e0", headers=headers[0], observation="more", timeout_s=9)
    assert refused.json()["code"] == "overloaded"
    flooding[0].cancel()
    await until(lambda: api.engine.num_held == RUNNING + 1)
    api.engine.release.set()
    assert (await calm).status_code == 200
    await asyncio.gather(*flooding, return_exceptions=True)
    assert api.engine.cache_salts[RUNNING - 1] != api.engine.cache_salts[0], "the calm tenant did not get the next slot"
