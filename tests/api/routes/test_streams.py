"""Acts as streams of server-sent events: deltas, one act at the end, and clients that disconnect."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.api.http.acting import while_connected
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import DISCRETE, HeldEngine, Served, serve, until

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    def reply(prompt: str) -> str:
        return "a short plan</think>" if prompt.endswith("<think>\n") else "go to the door"

    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=reply)) as served:
        yield served


@pytest.fixture
async def held(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, HeldEngine(tokenizer)) as served:
        yield served


async def stream(api: Served, **fields: Any) -> list[tuple[str, Any]]:
    body = {"episode_id": "e", "observation": "look", **fields}
    async with api.client.stream("POST", "/act", json=body, headers=STREAM) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        text = (await answer.aread()).decode()
    events = [dict(line.split(": ", 1) for line in event.split("\n")) for event in text.split("\n\n")[:-1]]
    return [(event["event"], json.loads(event["data"])) for event in events]


async def test_text_comes_in_deltas_and_the_act_last(api: Served):
    await api.open()
    *deltas, (kind, act) = await stream(api, step=0)
    assert [name for name, _ in deltas] == ["text"] * 4
    assert "".join(data["delta"] for _, data in deltas) == act["text"] == "go to the door"
    assert kind == "act"
    assert {**act, "replayed": True, "timing": None} == {**await api.act(step=0), "timing": None}


async def test_reasoning_and_text_have_separate_deltas(api: Served):
    await api.open(reasoning={"max_tokens": 32})
    events = await stream(api)
    thought = "".join(data["delta"] for name, data in events if name == "reasoning")
    assert "a short plan" in thought
    assert events[-1][1]["reasoning"] == "a short plan"
    assert "".join(data["delta"] for name, data in events if name == "text") == "go to the door"
    message = {"role": "assistant", "reasoning_content": "a short plan", "content": "go to the door"}
    assert (await api.trajectory(format="messages"))["messages"][-1] == message


async def test_a_discrete_action_is_one_delta(api: Served):
    await api.open(action_space=DISCRETE)
    (kind, data), (_, act) = await stream(api)
    assert (kind, data["delta"]) == ("text", act["action"])


async def test_a_replay_is_one_delta_and_the_stored_act(api: Served):
    await api.open()
    first = await api.act(step=0)
    (_, data), (_, act) = await stream(api, step=0)
    assert data["delta"] == first["text"]
    assert act["replayed"]
    assert {**act, "replayed": False, "timing": 0} == {**first, "timing": 0}


async def test_a_closing_act_is_the_act_alone(api: Served):
    await api.open()
    assert [kind for kind, _ in await stream(api, terminated=True)] == ["act"]


async def test_what_fails_before_the_first_event_is_a_plain_problem(api: Served):
    answer = await api.client.post("/act", json={"episode_id": "none", "observation": "x"}, headers=STREAM)
    assert (answer.status_code, answer.json()["code"]) == (404, "episode_not_found")
    assert answer.headers["content-type"] == "application/problem+json"


async def test_what_fails_later_is_an_error_event(api: Served, monkeypatch: pytest.MonkeyPatch):
    await api.open()

    async def broken(*_: Any, on_text: Any, **__: Any) -> Any:
        on_text("half")
        await asyncio.sleep(0.01)
        api.engine.die()
        return await ScriptedEngine.score(api.engine, [1], [1])

    monkeypatch.setattr(api.engine, "generate", broken)
    (_, data), (kind, problem) = await stream(api)
    assert data["delta"] == "half"
    assert (kind, problem["code"], problem["status"]) == ("error", "engine_unavailable", 503)


async def test_nothing_is_sent_before_the_commit(api: Served, monkeypatch: pytest.MonkeyPatch):
    await api.open()
    store, at_commit = api.app.state.services.sessions.store, asyncio.Event()
    commit, go = store.commit, asyncio.Event()

    async def slow(change: Any) -> None:
        at_commit.set()
        await go.wait()
        await commit(change)

    monkeypatch.setattr(store, "commit", slow)
    reading = asyncio.create_task(stream(api))
    await at_commit.wait()
    await asyncio.sleep(0.05)
    assert not reading.done()
    go.set()
    assert (await reading)[-1][0] == "act"


async def test_a_client_that_leaves_midway_aborts_and_commits_nothing(held: Served):
    await held.open()
    for _ in range(3):
        call = asyncio.create_task(stream(held))
        await until(lambda: held.engine.num_held > held.engine.num_aborted)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda: held.engine.num_held == held.engine.num_aborted)
    assert (await held.get())["step"] == 0


async def test_a_client_that_leaves_between_deltas_aborts(api: Served, monkeypatch: pytest.MonkeyPatch):
    await api.open()
    aborted = asyncio.Event()

    async def endless(*_: Any, on_text: Any, **__: Any) -> Any:
        try:
            while True:
                on_text("x")
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            aborted.set()
            raise

    monkeypatch.setattr(api.engine, "generate", endless)
    body = {"episode_id": "e", "observation": "look"}
    async with api.client.stream("POST", "/act", json=body, headers=STREAM) as answer:
        async for _ in answer.aiter_bytes():
            break
    async with asyncio.timeout(5):
        await aborted.wait()
    await until(lambda: api.app.state.services.sessions._cache.peek("e").in_flight is None)
    assert (await api.get())["step"] == 0


async def test_late_disconnect_cancels_nothing_else():
    left = asyncio.Event()
    request: Any = SimpleNamespace(receive=left.wait)
    async with while_connected(request):
        left.set()
        await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)  # a late cancellation would be raised here


async def test_aborted_acts_leave_nothing_behind(held: Served):
    """A short version of `python -m bench.aborts`, which aborts 5,000 acts."""
    await held.open()
    before = len(asyncio.all_tasks())
    for number in range(100):
        headers = STREAM if number % 2 else {}
        call = asyncio.create_task(held.post_act(headers=headers))
        await until(lambda number=number: held.engine.num_held == number + 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda number=number: held.engine.num_aborted == number + 1)
    await until(lambda: len(asyncio.all_tasks()) <= before + 2)
