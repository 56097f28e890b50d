"""The client against the real service with a scripted engine: streams, batches, forks, feedback, exports, policies."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import (
    Act,
    ApiError,
    AsyncClient,
    Client,
    ConnectionFailed,
    Delta,
    EpisodeDeleted,
    EpisodeNotFound,
    EpisodicError,
    IdempotencyMismatch,
    InvalidResponse,
    Retry,
    StepConflict,
    calls,
)
from service.client.calls import ActFields
from service.client.state import MAX_BATCH
from service.client.streams import EventReader
from service.engine.base import EngineUnavailable
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.adapters import make_adapter
from tests.support.serving import DISCRETE, Served, serve, until

QUICK = Retry(max_retries=2, total_s=2.0, first_s=0.001, max_s=0.01)


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    def reply(prompt: str) -> str:
        return "so far</think>" if prompt.endswith("<think>\n") else "go to the door"

    engine = ScriptedEngine(tokenizer, reply=reply)
    engine.info = dataclasses.replace(engine.info, max_lora_rank=8)
    make_adapter(tmp_path / "adapters" / "one", 1)
    async with serve(tmp_path, engine, adapters=tmp_path / "adapters") as served:
        yield served


async def blocking(api: Served, use: Callable[[Client], Any]) -> Any:
    def call() -> Any:
        with Client(api.url, retry=QUICK) as client:
            return use(client)

    return await asyncio.to_thread(call)


async def test_blocking_client_all_calls(api: Served, tmp_path: Path):
    def use(client: Client) -> None:
        assert "assistant" in {profile.name for profile in client.profiles()}
        episode = client.episode(profile="code", reasoning={"max_tokens": 16}, group="g", idle_ttl_s=60.0)
        assert episode.resource.profile == "code"
        *deltas, act = episode.stream("write")
        assert isinstance(act, Act)
        assert (act.text, act.reasoning) == ("go to the door", "so far")
        assert "".join(d.text for d in deltas if isinstance(d, Delta) and d.kind == "text") == act.text
        assert episode.step == 1
        recorded = episode.record("by hand", "next")
        assert (recorded.action, recorded.finish_reason, episode.step) == ("by hand", "recorded", 2)
        assert episode.feedback(5, "good", rater="ann", step=1).rating == 5
        forks = episode.fork(3, at_step=1)
        assert [fork.step for fork in forks] == [1, 1, 1]
        assert forks[0].resource.parent is not None
        results = client.act_batch([(fork, f"way {n}", {"reward": 1.0}) for n, fork in enumerate(forks)])
        assert [fork.step for fork in forks] == [2, 2, 2]
        assert all(isinstance(result, Act) for result in results)
        forks[0].step = 0
        bad, good = client.act_batch([(forks[0], "other", {}), (forks[1], "on", {})])
        assert isinstance(bad, ApiError)
        assert isinstance(good, Act)
        assert (forks[0].step, forks[1].step) == (0, 3)
        assert {e.episode_id for e in client.episodes(group="g")} == {e.id for e in (episode, *forks)}
        episode.end(terminated=True)
        (exported,) = client.export("messages", group="g")
        assert exported["episode"]["episode_id"] == episode.id
        evaluation = client.evaluation(by="group", baseline="g", level=0.9, tag="none of these")
        assert (evaluation.groups, evaluation.level, evaluation.warnings[0].code) == ((), 0.9, "no_episodes")
        (group,) = client.evaluation(by="group", baseline="g", group="g").groups
        assert (group.value, group.episodes, group.returns.n, group.excluded) == (
            "g",
            4,
            1,
            {"active": 3, "unscored": 1},
        )
        loaded = client.load_policy("walker", "one", alias=False, round=0, evaluation={"won": 1})
        assert (loaded.kind, loaded.current, loaded.round, loaded.evaluation) == ("adapter", False, 0, {"won": 1})
        assert client.load_policy("walker", version=loaded.version, parent="walker@00000000").current
        assert [policy.name for policy in client.policies()] == ["scripted", "walker"]
        assert [version.parent for version in client.policy_versions()] == ["walker@00000000"]
        assert client.episode(policy="walker", policy_updates="follow").resource.policy_updates == "follow"
        with pytest.raises(ApiError, match="no_previous_version"):
            client.roll_back_policy("walker")
        uploaded = client.upload_policy("walker", tmp_path / "adapters" / "one", alias=False, round=2)
        assert (uploaded.version, uploaded.round, uploaded.current) == (loaded.version, 2, True)
        assert client.set_default_policy("walker") == "walker"
        assert client.set_default_policy(None) == "scripted"
        client.remove_policy("walker")
        with pytest.raises(ApiError, match="policy_not_found"):
            client.remove_policy("walker")

    await blocking(api, use)


async def test_asyncio_client_all_calls(api: Served, tmp_path: Path):
    async with AsyncClient(api.url, retry=QUICK) as client:
        assert "assistant" in {profile.name for profile in await client.profiles()}
        episode = await client.episode(profile="code", group="g")
        events = [event async for event in episode.stream("write")]
        assert isinstance(events[-1], Act)
        assert (len(events), episode.step) == (5, 1)
        assert (await episode.record("by hand", "next")).step == 1
        assert (await episode.feedback(4)).rating == 4
        forks = await episode.fork(2)
        results = await client.act_batch([(fork, "on", {}) for fork in forks])
        assert [result.step for result in results if isinstance(result, Act)] == [2, 2]
        assert len([e async for e in client.episodes(group="g")]) == 3
        await episode.end(truncated=True)
        assert len([line async for line in client.export("tokens")]) == 1
        assert [group.value for group in (await client.evaluation(status="ended")).groups] == ["scripted"]
        assert (await client.load_policy("walker", "one")).rank == 4
        assert len(await client.policies()) == 2
        assert [version.name for version in await client.policy_versions()] == ["walker"]
        with pytest.raises(ApiError, match="no_previous_version"):
            await client.roll_back_policy("walker")
        assert await client.set_default_policy(None) == "scripted"
        assert (await client.upload_policy("walker", str(tmp_path / "adapters" / "one"))).current
        await client.remove_policy("walker")


async def test_every_page_is_walked(api: Served):
    for number in range(7):
        await api.open(f"e{number}", tags=["t"])

    def use(client: Client) -> list[str]:
        page = client.list_episodes(limit=3, tag="t")
        assert page.next_cursor is not None
        return [episode.episode_id for episode in client.episodes(tag="t")]

    assert await blocking(api, use) == [f"e{number}" for number in reversed(range(7))]


async def test_a_stream_that_is_left_aborts_its_act(api: Served, monkeypatch: pytest.MonkeyPatch):
    async def endless(*_: Any, on_text: Any, **__: Any) -> Any:
        while True:
            on_text("x")
            await asyncio.sleep(0.005)

    monkeypatch.setattr(api.engine, "generate", endless)
    async with AsyncClient(api.url, retry=QUICK) as client:
        episode = await client.episode(episode_id="e")
        events = episode.stream("write")
        assert await anext(events) == Delta("text", "x")
        await events.aclose()
        await until(lambda: api.app.state.services.sessions._cache.peek("e").in_flight is None)
        assert (episode.step, (await episode.refresh()).step) == (0, 0)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_streams_problems_are_errors(api: Served, kind: str):
    await api.open("e")

    def use(client: Client) -> None:
        episode = client.resume("e")
        episode.step = 3
        with pytest.raises(StepConflict):
            list(episode.stream("x"))
        client.resume("e").delete()
        with pytest.raises(ApiError, match="episode_deleted"):
            list(episode.stream("x"))

    if kind == "sync":
        await blocking(api, use)
        return
    async with AsyncClient(api.url, retry=QUICK) as client:
        episode = await client.resume("e")
        episode.step = 3
        with pytest.raises(StepConflict):
            [event async for event in episode.stream("x")]
        with pytest.raises(EpisodeNotFound):
            await client.resume("none")


def _events(text: str, cut: int) -> list[Any]:
    data, reader, found = text.encode(), EventReader(), []
    for start in range(0, len(data), cut):
        found += reader.feed(data[start : start + cut])
    reader.end()
    return found


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_events_are_read_however_they_are_cut(cut: int, newline: str):
    lines = [
        ": hello",
        "event: text",
        'data: {"delta":',
        'data: "ü\\n"}',
        "",
        "event:act",
        'data:{"episode_id":"e","step":3}',
        "",
        "",
    ]
    delta, act = _events(newline.join(lines), cut)
    assert delta == Delta("text", "ü\n")
    assert (act.episode_id, act.step) == ("e", 3)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("first_text", ["", "half"])
async def test_a_stream_is_retried_until_its_first_event(
    api: Served, monkeypatch: pytest.MonkeyPatch, kind: str, first_text: str
):
    """The service sends the status of a stream before the engine has answered: a failure is then an event."""
    await api.open("e")
    generate, failures = api.engine.generate, iter([True])

    async def fails_once(*args: Any, on_text: Any, **options: Any) -> Any:
        if next(failures, False):
            if first_text:
                on_text(first_text)
            raise EngineUnavailable("the engine died")
        return await generate(*args, on_text=on_text, **options)

    monkeypatch.setattr(api.engine, "generate", fails_once)

    async def stream() -> list[Any]:
        if kind == "sync":
            return await blocking(api, lambda client: list(client.resume("e").stream("x")))
        async with AsyncClient(api.url, retry=QUICK) as client:
            return [event async for event in (await client.resume("e")).stream("x")]

    if first_text:
        with pytest.raises(ApiError, match="engine_unavailable"):
            await stream()
    else:
        assert (await stream())[-1].text == "go to the door"


def test_a_stream_without_its_act_is_a_lost_answer():
    with pytest.raises(ConnectionFailed):
        _events('event: text\ndata: {"delta": "a"}\n\n', 1000)


async def test_an_export_that_is_cut_off_is_noticed(api: Served, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        await api.open(name)
        await api.act(name, None, terminated=True)
    store, trajectory = api.app.state.services.sessions.store, api.app.state.services.sessions.store.trajectory

    async def broken(episode_id: str) -> Any:
        if episode_id == "a":
            raise RuntimeError("broken")
        return await trajectory(episode_id)

    monkeypatch.setattr(store, "trajectory", broken)

    def use(client: Client) -> None:
        with pytest.raises(ConnectionFailed):
            list(client.export())

    await blocking(api, use)


# --- responses that are late, lost, or sent by something other than the service


async def test_an_export_is_cut_into_lines_at_line_feeds_alone(api: Served):
    await api.open("e", instructions="a\u2028b\u0085c\rd")
    await api.act("e", None, terminated=True)
    (line,) = await blocking(api, lambda client: list(client.export()))
    assert line["episode"]["instructions"] == "a\u2028b\u0085c\rd"
    async with AsyncClient(api.url, retry=QUICK) as client:
        assert [found async for found in client.export()] == [line]


async def test_none_takes_back_what_a_profile_gives(api: Served):
    def use(client: Client) -> None:
        assert client.episode(profile="translation").resource.goal == "Translate into English."
        episode = client.episode(profile="translation", goal=None, max_steps=None)
        assert (episode.resource.goal, episode.resource.max_steps) == (None, None)

    await blocking(api, use)


async def test_closing_a_blocking_stream_aborts_its_act(api: Served, monkeypatch: pytest.MonkeyPatch):
    aborted = threading.Event()

    async def endless(*_: Any, on_text: Any, **__: Any) -> Any:
        try:
            while True:
                on_text("x")
                await asyncio.sleep(0.005)
        finally:
            aborted.set()

    monkeypatch.setattr(api.engine, "generate", endless)

    def use(client: Client) -> None:
        with contextlib.closing(client.episode().stream("write")) as events:
            next(events)
        assert aborted.wait(10)

    await blocking(api, use)


class Answers(httpx.BaseTransport):
    """A transport that answers with these responses or errors in order, and repeats the last one."""

    def __init__(self, *answers: httpx.Response | httpx.RequestError) -> None:
        self._answers = answers
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
        if isinstance(answer, httpx.RequestError):
            raise answer
        return answer


def client_of(transport: Answers) -> Client:
    return Client(transport=transport, retry=QUICK)


RATING = {"episode_id": "e", "rating": 5}


@pytest.mark.parametrize(
    "lost",
    [
        httpx.ReadError("lost"),
        httpx.ConnectError("refused"),
        httpx.Response(503, json={}),
        httpx.Response(502, json={}),
    ],
)
@pytest.mark.parametrize("rater", [None, "ann"])
def test_a_repeated_rating_has_the_same_key(lost: Any, rater: str | None):
    resource = httpx.Response(200, json={"episode_id": "e", "status": "active", "step": 1})
    transport = Answers(resource, lost, httpx.Response(201, json=RATING))
    with client_of(transport) as client:
        episode = client.resume("e")
        assert episode.feedback(5, rater=rater).rating == 5
    first, second = (request.headers["Idempotency-Key"] for request in transport.requests[1:])
    assert first == second


def test_lost_delete_is_not_repeated():
    transport = Answers(httpx.ReadError("lost"), httpx.Response(404, json={"code": "policy_not_found"}))
    with client_of(transport) as client, pytest.raises(ConnectionFailed):
        client.remove_policy("walker")


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.wait_ready(),
        lambda client: client.remove_policy("walker"),
        lambda client: list(client.export()),
        lambda client: client.profiles(),
    ],
)
@pytest.mark.parametrize(
    "answer", [httpx.Response(302, headers={"Location": "/login"}), httpx.Response(304)], ids=["302", "304"]
)
def test_a_redirect_is_no_answer(call: Callable[[Client], Any], answer: httpx.Response):
    with client_of(Answers(answer)) as client, pytest.raises(InvalidResponse, match=str(answer.status_code)):
        call(client)


ACT = b'event: act\ndata: {"step": "x"}\n\n'
ERROR = b"event: error\ndata: {}\n\n"


@pytest.mark.parametrize(
    ("call", "body"),
    [
        *((Client.profiles, body) for body in (b"<html>", b"[1]", b'{"results": []}')),
        (lambda client: list(client.export()), b"<html>\n"),
        (lambda client: client.act_batch([(client.resume("e"), "x", {})]), b'{"results": []}'),
        *((lambda client: list(client.resume("e").stream("x")), body) for body in (ACT, ERROR, b"data: 1\n\n" + ACT)),
    ],
)
def test_foreign_response_is_invalid_response(call: Callable[[Client], Any], body: bytes):
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/episode/e":
            return httpx.Response(200, json={"episode_id": "e", "status": "active", "step": 0})
        return httpx.Response(200, content=body)

    with Client(transport=httpx.MockTransport(handle)) as client, pytest.raises(InvalidResponse):
        call(client)


def test_an_export_waits_for_a_busy_service():
    busy = httpx.Response(503, json={"code": "draining"}, headers={"Retry-After": "0"})
    transport = Answers(busy, httpx.Response(200, content=b'{"a": 1}\n'))
    with client_of(transport) as client:
        assert list(client.export()) == [{"a": 1}]
    assert transport.requests[0].headers["accept"] == "application/x-ndjson"


def test_an_export_that_ends_within_a_line_is_cut_off():
    with client_of(Answers(httpx.Response(200, content=b'{"a": 1}\n{"b": '))) as client:
        lines = client.export()
        assert next(lines) == {"a": 1}
        with pytest.raises(ConnectionFailed):
            next(lines)


def test_a_batchs_passing_problems_are_sent_again():
    opened = [httpx.Response(200, json={"episode_id": name, "status": "active", "step": 0}) for name in "ab"]
    acted = [{"episode_id": name, "step": 0, "action": "go"} for name in "ab"]
    busy = {"status": 503, "code": "engine_unavailable"}
    transport = Answers(
        *opened,
        httpx.Response(200, json={"results": [acted[0], busy]}),
        httpx.Response(200, json={"results": [acted[1]]}),
    )
    with client_of(transport) as client:
        one, two = client.resume("a"), client.resume("b")
        results = client.act_batch([(one, "x", {}), (two, "y", {})])
        assert [result.episode_id for result in results if isinstance(result, Act)] == ["a", "b"]
        assert (one.step, two.step) == (1, 1)
    again = json.loads(transport.requests[-1].content)["acts"]
    assert [act["episode_id"] for act in again] == ["b"]


@pytest.mark.parametrize("failure", [httpx.Response(403, json={}), httpx.ReadError("lost")])
def test_a_batch_that_fails_halfway_can_be_sent_again(failure: Any):
    opened = [httpx.Response(200, json={"episode_id": name, "status": "active", "step": 0}) for name in "ab"]
    first = {"episode_id": "a", "step": 0, "action": "go"}
    busy = {"status": 503, "code": "engine_unavailable"}
    halfway = httpx.Response(200, json={"results": [first, busy]})
    with client_of(Answers(*opened, halfway, failure)) as client:
        one, two = client.resume("a"), client.resume("b")
        with pytest.raises(EpisodicError):
            client.act_batch([(one, "x"), (two, "y")])
    assert (one.step, two.step) == (0, 0), "the same call would take another step"


async def test_a_batch_of_any_size_is_sent_in_parts(api: Served):
    def use(client: Client) -> None:
        episodes = [*client.episode(action_space=DISCRETE).fork(MAX_BATCH), client.episode(action_space=DISCRETE)]
        results = client.act_batch([(episode, "x") for episode in episodes])
        assert [result.episode_id for result in results if isinstance(result, Act)] == [one.id for one in episodes]
        assert {episode.step for episode in episodes} == {1}

    await blocking(api, use)


async def test_a_batch_needs_no_further_fields(api: Served):
    def use(client: Client) -> None:
        one, two = client.episode(), client.episode()
        results = client.act_batch([(one, "x"), (two, "y", {"info": {"n": 1}})])
        assert [result.action for result in results if isinstance(result, Act)] == ["go to the door"] * 2
        assert (one.step, two.step) == (1, 1)
        assert client.act_batch([]) == []

    await blocking(api, use)


async def test_a_second_actor_is_told_that_its_step_was_taken(api: Served):
    def use(client: Client) -> None:
        one = client.episode()
        with Client(api.url, retry=QUICK) as other:
            two = other.resume(one.id)
            one.act("first")
            with pytest.raises(IdempotencyMismatch):
                two.act("second")
            assert two.refresh().step == 1
            assert two.act("second").step == 1
        with pytest.raises(IdempotencyMismatch):
            one.act("third")
        one.delete()
        with pytest.raises(EpisodeDeleted):
            one.refresh()

    await blocking(api, use)


def test_a_batch_waits_as_long_as_its_acts_may_take():
    def timeout_s(*deadlines_s: float | None) -> float | None:
        return calls.batch([("e", 0, "x", ActFields(timeout_s=deadline_s)) for deadline_s in deadlines_s]).timeout_s

    assert timeout_s(100.0, 700.0) == 705.0
    assert timeout_s(100.0, None) is None


# --- the command line


async def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)


async def test_the_commands_find_the_service_by_the_environment(api: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_URL", api.url)
    await api.open("here")
    assert json.loads((await run("episodes", "--json")).stdout)["episode_id"] == "here"


async def test_the_commands_list_and_export(api: Served, tmp_path: Path):
    for name in ("a", "b"):
        await api.open(name, action_space=DISCRETE, tags=[name])
        await api.act(name)
    await api.act("a", None, terminated=True, reward=2.0)
    listed = await run("episodes", "--url", api.url, "--json", "--tag", "b")
    assert [json.loads(line)["episode_id"] for line in listed.stdout.splitlines()] == ["b"]
    table = (await run("episodes", "--url", api.url, "--limit", "1")).stdout
    assert "b" in table
    assert "active" in table
    file = tmp_path / "out.ndjson"
    exported = await run("export", "--url", api.url, "--format", "tokens", "--output", str(file))
    assert (exported.returncode, exported.stderr) == (0, "1 trajectories\n")
    (line,) = file.read_text().splitlines()
    assert json.loads(line) == await api.trajectory("a", "tokens")


@pytest.mark.parametrize("url", ["localhost:8000", "http://[::1"])
async def test_a_command_with_no_url_says_so(url: str):
    failed = await run("episodes", "--url", url)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: ")


async def test_a_command_without_a_service_says_so(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    failed = await run("export", "--url", url, "--output", str(tmp_path / "out"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: ")
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
