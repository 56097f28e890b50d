"""Acts as streams of server-sent events: deltas, one act at the end, and clients that disconnect."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.api.http.acting import WhileConnected
from service.engine.tokenizer import HFTokenizer
from service.testing.memory_store import MemoryStore
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


async def test_a_retry_at_a_replica_that_missed_the_step_streams_the_stored_text(
    tmp_path: Path, tokenizer: HFTokenizer
):
    store = MemoryStore()
    async with (
        serve(tmp_path / "behind", ScriptedEngine(tokenizer, reply=lambda _: "left"), store=store) as behind,
        serve(tmp_path / "ahead", ScriptedEngine(tokenizer, reply=lambda _: "right"), store=store) as ahead,
    ):
        await behind.open()  # it caches the episode without steps
        await ahead.act(step=0)
        (_, data), (kind, act) = await stream(behind, step=0)
    assert (kind, act["replayed"]) == ("act", True)
    assert data["delta"] == act["text"] == "right"


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
    async with WhileConnected(request):
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


# Before the first token


async def test_headers_arrive_before_the_first_token_and_comments_while_waiting(
    held: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("service.api.routes.act_streams.HEARTBEAT_S", 0.05)
    await held.open()
    body = {"episode_id": "e", "observation": "look", "step": 0}
    async with held.client.stream("POST", "/act", json=body, headers=STREAM) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-store, no-transform"
        assert "content-length" not in answer.headers
        lines = answer.aiter_lines()
        assert [await anext(lines) for _ in range(4)] == [": waiting", ""] * 2
        held.engine.release.set()
        rest = [line async for line in lines if line and not line.startswith(":")]
    assert rest[0] == "event: text"
    assert rest[-2] == "event: act"


@pytest.mark.store("sqlite")
async def test_headers_arrive_while_the_store_does_not_respond(
    tmp_path: Path, tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("service.api.routes.act_streams.HEARTBEAT_S", 0.05)
    store, release = MemoryStore(), asyncio.Event()
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store, max_live_episodes=1) as api:
        await api.open()
        await api.open("another")  # evicts e
        read = store.trajectory

        async def slow(episode_id: str) -> Any:
            await release.wait()
            return await read(episode_id)

        monkeypatch.setattr(store, "trajectory", slow)
        body = {"episode_id": "e", "observation": "look"}
        async with api.client.stream("POST", "/act", json=body, headers=STREAM) as answer:
            assert answer.status_code == 200
            release.set()
            assert "event: act" in (await answer.aread()).decode()


async def test_a_retry_that_joins_an_act_gets_its_headers_at_once(held: Served):
    await held.open()
    body = {"episode_id": "e", "observation": "look", "step": 0}
    first = asyncio.create_task(held.client.post("/act", json=body))
    await until(lambda: held.engine.num_held == 1)
    async with held.client.stream("POST", "/act", json=body, headers=STREAM) as answer:
        assert answer.status_code == 200
        held.engine.release.set()
        assert '"replayed":true' in (await answer.aread()).decode()
    assert (await first).status_code == 200


async def test_what_is_wrong_with_the_request_is_a_plain_problem(api: Served):
    small: dict[str, Any] = {"context": {"overflow": "error", "max_tokens": 16}, "sampling": {"max_tokens": 8}}
    await api.open("full", **small)
    await api.open("ended", max_steps=1)
    await api.act("ended", observation=None, terminated=True)
    await api.open()
    for fields, expected in (
        ({"episode_id": "full", "observation": "too long " * 20}, (409, "context_overflow")),
        ({"episode_id": "ended", "observation": "x"}, (409, "episode_ended")),
        ({"episode_id": "e", "observation": "x", "step": 4}, (409, "step_conflict")),
        ({"episode_id": "e"}, (422, "invalid_request")),
        ({"episode_id": "e", "observation": "x", "legal_actions": ["y"]}, (422, "invalid_request")),
    ):
        answer = await api.client.post("/act", json=fields, headers=STREAM)
        assert (answer.status_code, answer.json()["code"]) == expected


class LeavingCaller:
    """A caller of the app that leaves at a certain moment: when it has sent its body, or at the start of the answer."""

    def __init__(self, body: dict[str, Any], *, leaves_at_start: bool) -> None:
        self._messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self._has_left = asyncio.Event()
        self._leaves_at_start = leaves_at_start

    async def receive(self) -> Any:
        if self._messages:
            if not self._leaves_at_start:
                self._has_left.set()
            return self._messages.pop()
        await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._has_left.set()


@pytest.mark.parametrize("leaves_at_start", [False, True])
async def test_a_caller_that_leaves_before_the_first_event_aborts_the_act(held: Served, leaves_at_start: bool):
    await held.open()
    before = len(asyncio.all_tasks())
    for _ in range(3):
        caller = LeavingCaller({"episode_id": "e", "observation": "look"}, leaves_at_start=leaves_at_start)
        headers = [(b"accept", b"text/event-stream"), (b"host", b"localhost")]
        scope: Any = {"type": "http", "method": "POST", "path": "/act", "raw_path": b"/act", "query_string": b""}
        scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http"}
        scope |= {"http_version": "1.1", "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.4"}}
        async with asyncio.timeout(5):
            await held.app(scope, caller.receive, caller.send)
    services = held.app.state.services
    await until(lambda: services.sessions._cache.peek("e").in_flight is None)
    assert held.engine.num_held == held.engine.num_aborted
    assert services.admission._num_acts == 0
    assert (await held.get())["step"] == 0
    await until(lambda: len(asyncio.all_tasks()) <= before + 1)
