"""Overload over real HTTP: which acts are refused, that they leave nothing behind, and who gets the next slot."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse

from service.access.keys import SCOPES, new_key
from service.engine.base import SLOT
from service.engine.tokenizer import HFTokenizer
from service.lifecycle import Phase
from service.testing.scripted_engine import ScriptedEngine
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
    monkeypatch.setattr("service.access.keys.FRESH_S", 0.0)
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


# What an act costs the engine


class CountingEngine(ScriptedEngine):
    """Counts its requests in flight, in all and by tenant (cache salt). Each request takes a few milliseconds."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        super().__init__(tokenizer, latency_s=0.002)
        self.num_running: Counter[str | None] = Counter()
        self.most_running: Counter[str | None] = Counter()
        self.num_ended = 0

    async def _call(self, prompt_token_ids: list[int], cache_salt: str | None) -> None:
        for tenant in ("all", cache_salt):
            self.num_running[tenant] += 1
            self.most_running[tenant] = max(self.most_running[tenant], self.num_running[tenant])
        try:
            await super()._call(prompt_token_ids, cache_salt)
        finally:
            self.num_ended += 1
            for tenant in ("all", cache_salt):
                self.num_running[tenant] -= 1


async def key_of(api: Served, tenant: str) -> dict[str, str]:
    """Creates an API key. Returns the header that authenticates the tenant."""
    key, record = new_key(tenant, SCOPES, 1.0)
    await api.app.state.services.sessions.store.add_key(record)
    return {"Authorization": f"Bearer {key}"}


def random_actions(num_actions: int) -> dict[str, Any]:
    generator = random.Random(1)
    actions = [f"{generator.getrandbits(32):08x}" for _ in range(num_actions)]
    return {"type": "discrete", "actions": actions, "probs": "all"}


@pytest.mark.parametrize("max_candidates", [None, 4])
async def test_each_request_of_a_discrete_act_takes_a_slot(
    tmp_path: Path, tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch, max_candidates: int | None
):
    monkeypatch.setattr("service.access.keys.FRESH_S", 0.0)
    engine = CountingEngine(tokenizer)
    engine.max_candidates = max_candidates
    async with serve(tmp_path, engine, max_running_acts=8) as api:
        large, small = await key_of(api, "large"), await key_of(api, "small")
        await api.client.post("/episode", json={"episode_id": "l", "action_space": random_actions(1024)}, headers=large)
        await api.client.post("/episode", json={"episode_id": "s"}, headers=small)
        acting = asyncio.create_task(api.post_act("l", headers=large))
        await until(lambda: engine.num_running["all"] == 8)
        for step in range(3):
            assert (await api.post_act("s", headers=small)).json()["step"] == step
            assert not acting.done(), "the small acts waited for all requests of the large one"
        assert (await acting).status_code == 200
        assert engine.num_calls > 100
        assert engine.most_running["all"] == 8


async def test_the_quota_of_concurrent_acts_holds_for_the_requests_of_an_act(tmp_path: Path, tokenizer: HFTokenizer):
    engine = CountingEngine(tokenizer)
    async with serve(tmp_path, engine, max_running_acts=64, quota={"concurrent_acts": 3}) as api:
        for name in ("a", "b"):
            await api.open(name, action_space=random_actions(256))
        assert [answer["step"] for answer in await asyncio.gather(api.act("a"), api.act("b"))] == [0, 0]
        assert engine.most_running["all"] == 3


async def test_a_batch_larger_than_the_quota_runs_in_waves(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer), quota={"concurrent_acts": 3}) as api:
        names = [f"e{number}" for number in range(10)]
        for name in (*names, "single"):
            await api.open(name)
        admission = api.app.state.services.sessions.admission
        acts = [{"episode_id": name, "observation": "look"} for name in names]
        acts[2]["step"] = 7
        acts[8]["timeout_s"] = 0.05
        batch = asyncio.create_task(api.client.post("/act/batch", json={"acts": acts}))
        await until(lambda: api.engine.num_held == 3)
        await asyncio.sleep(0.1)
        assert (api.engine.num_held, admission._num_acts) == (3, 3)
        refused = await api.post_act("single")
        assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
        api.engine.release.set()
        results = (await batch).json()["results"]
        codes = ["step_conflict" if n == 2 else "deadline_exceeded" if n == 8 else None for n in range(10)]
        assert [result.get("code") for result in results] == codes
        assert (await api.act("single"))["step"] == 0
        assert admission._num_acts == 0


async def test_a_batch_whose_caller_leaves_keeps_no_places(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer), quota={"concurrent_acts": 2}) as api:
        names = [f"e{number}" for number in range(6)]
        for name in names:
            await api.open(name)
        acts = [{"episode_id": name, "observation": "look"} for name in names]
        batch = asyncio.create_task(api.client.post("/act/batch", json={"acts": acts}))
        await until(lambda: api.engine.num_held == 2)
        batch.cancel()
        await asyncio.gather(batch, return_exceptions=True)
        admission = api.app.state.services.sessions.admission
        await until(lambda: api.engine.num_aborted == 2 and admission._num_acts == 0 and not admission._accounts)
        api.engine.release.set()
        assert [(await api.act(name))["step"] for name in names] == [0] * 6


async def test_a_batch_in_waves_is_completed_by_a_drain_and_aborted_by_its_timeout(
    tmp_path: Path, tokenizer: HFTokenizer
):
    async with serve(tmp_path, HeldEngine(tokenizer), quota={"concurrent_acts": 1}) as api:
        for name in "abc":
            await api.open(name)
        acts = [{"episode_id": name, "observation": "look"} for name in "abc"]
        services = api.app.state.services
        batch = asyncio.create_task(api.client.post("/act/batch", json={"acts": acts}))
        await until(lambda: api.engine.num_held == 1)
        services.lifecycle.enter(Phase.DRAINING)
        api.engine.release.set()
        api.engine.release.clear()  # only the act in flight goes on
        await until(lambda: api.engine.num_held == 2)
        await services.sessions.abort_acts()
        first, *others = (await batch).json()["results"]
        assert (first["step"], [other["code"] for other in others]) == (0, ["draining", "draining"])


async def test_the_default_queue_holds_the_acts_of_hundreds_of_workers(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer), max_running_acts=4) as api:
        names = [f"e{number}" for number in range(256)]
        await asyncio.gather(*(api.open(name) for name in names))
        acting = [asyncio.create_task(api.post_act(name)) for name in names]
        await until(lambda: api.app.state.services.sessions.admission._num_acts == 256)
        api.engine.release.set()
        assert {answer.status_code for answer in await asyncio.gather(*acting)} == {200}


class InferenceEngine(HeldEngine):
    """An engine whose app of /v1 makes `n` requests to the model, which end after `release` is set. As vLLM's app, it
    cancels them if the caller leaves."""

    async def openai_app(self) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            num_requests = json.loads((await receive())["body"]).get("n", 1)
            working = asyncio.gather(*(self._request() for _ in range(num_requests)))
            leaving = asyncio.ensure_future(receive())
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
            if leaving.cancel():
                await JSONResponse({})(scope, receive, send)
            else:
                working.cancel()

        return app

    async def _request(self) -> None:
        async with SLOT.get()():
            await self._hold()


async def test_each_request_of_a_v1_call_takes_a_slot(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, InferenceEngine(tokenizer), max_running_acts=2) as api:
        admission = api.app.state.services.sessions.admission
        calls = [asyncio.create_task(api.client.post("/v1/completions", json={"n": 5})) for _ in range(2)]
        await until(lambda: sum(len(account.waiting) for account in admission._accounts.values()) == 8)
        assert (api.engine.num_held, admission._num_running) == (2, 2)
        api.engine.release.set()
        assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200, 200]
        assert api.engine.num_held == 10
        assert not admission._accounts


@pytest.mark.parametrize(
    "body", [{"n": 1025}, {"prompt": ["a"] * 513, "best_of": 2}, {"input": [[1]] * 1025}, {"documents": [""] * 1025}]
)
async def test_a_v1_call_of_too_many_requests_is_refused(tmp_path: Path, tokenizer: HFTokenizer, body: dict[str, Any]):
    async with serve(tmp_path, InferenceEngine(tokenizer)) as api:
        refused = await api.client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request")
        assert "at most 1024" in refused.json()["error"]["message"]
        api.engine.release.set()
        assert (await api.client.post("/v1/completions", json={"prompt": [1] * 2000})).status_code == 200
    assert api.engine.num_held == 1


async def test_the_requests_of_a_v1_call_count_against_the_quotas(tmp_path: Path, tokenizer: HFTokenizer):
    quota = {"calls_per_s": 3, "concurrent_acts": 1}
    async with serve(tmp_path, InferenceEngine(tokenizer), max_running_acts=4, quota=quota) as api:
        call = asyncio.create_task(api.client.post("/v1/completions", json={"n": 300}))
        await until(lambda: api.engine.num_held)
        assert api.engine.num_held == 1
        api.engine.release.set()
        assert (await call).status_code == 200
        refused = await api.client.post("/v1/completions", json={"n": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")


async def test_a_caller_of_v1_that_leaves_the_queue_frees_its_place(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, InferenceEngine(tokenizer), max_running_acts=1, max_queued_acts=1) as api:
        admission = api.app.state.services.sessions.admission

        def post() -> "asyncio.Task[httpx.Response]":
            return asyncio.create_task(api.client.post("/v1/completions", json={}))

        running = post()
        await until(lambda: api.engine.num_held == 1)
        for _ in range(3):
            waiting = post()
            await until(lambda: admission._num_acts == 2)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await until(lambda: admission._num_acts == 1)
        waiting = post()
        await until(lambda: admission._num_acts == 2)
        api.engine.release.set()
        assert [(await call).status_code for call in (running, waiting)] == [200, 200]
