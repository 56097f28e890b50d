"""Tests of sessions: eviction, restarts and several replicas give the same tokens; retries, cancellation, commits."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.engine.base import EngineUnavailable, TextSink
from service.engine.tokenizer import HFTokenizer
from service.errors import Conflict, Gone
from service.sessions.acts import ActRequest
from service.sessions.sessions import Sessions
from service.store.base import Commit, StepTaken, Store, StoreUnavailable
from service.store.sql import SQLStore
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Message, Step, StopReason
from tests.support.serving import DISCRETE, HeldEngine, serve, until

SPACES: dict[str, dict[str, Any]] = {"text": {"type": "text"}, "discrete": DISCRETE}
NUM_STEPS = 24
SLIDING = {"context": {"overflow": "slide", "max_tokens": 160}, "sampling": {"max_tokens": 8, "seed": 7}}


def fields_of(step: int) -> dict[str, Any]:
    return {"observation": f"observation {step} " + "long " * (step % 5), "reward": 1.0 if step else None}


async def uninterrupted(folder: Path, tokenizer: HFTokenizer, space: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    """Plays an episode without interruption. Returns its segments of tokens, and the prompts of its engine."""
    engine = ScriptedEngine(tokenizer)
    async with serve(folder, engine) as api:
        await api.open(instructions="Play.", action_space=space, **SLIDING)
        for step in range(NUM_STEPS):
            await api.act(**fields_of(step))
        return (await api.trajectory(format="tokens"))["segments"], engine.prompts


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
async def test_an_episode_goes_on_after_restarts_with_the_same_tokens(
    tmp_path: Path, tokenizer: HFTokenizer, space: dict[str, Any]
):
    segments, prompts = await uninterrupted(tmp_path / "uninterrupted", tokenizer, space)
    seen: list[list[int]] = []
    for part in range(4):
        engine = ScriptedEngine(tokenizer)
        async with serve(tmp_path / "restarted", engine) as api:
            if not part:
                await api.open(instructions="Play.", action_space=space, **SLIDING)
            for step in range(part * NUM_STEPS // 4, (part + 1) * NUM_STEPS // 4):
                await api.act(**fields_of(step), step=step)
            found = (await api.trajectory(format="tokens"))["segments"]
            assert (await api.get())["episode_return"] == step
        seen += engine.prompts
    assert len(segments) > 2, "the context must have slid"
    assert found == segments
    assert seen == prompts


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
async def test_an_evicted_episode_goes_on_with_the_same_tokens(
    tmp_path: Path, tokenizer: HFTokenizer, space: dict[str, Any]
):
    segments, _ = await uninterrupted(tmp_path / "uninterrupted", tokenizer, space)
    async with serve(tmp_path / "evicted", ScriptedEngine(tokenizer), max_live_episodes=1) as api:
        names = [f"e{number}" for number in range(4)]
        for name in names:
            await api.open(name, instructions="Play.", action_space=space, **SLIDING)
        for step in range(NUM_STEPS):
            for name in names:  # in sequence: an episode with an act in flight is not evicted
                await api.act(name, **fields_of(step), step=step)
                assert [episode.episode_id for episode in api.app.state.services.sessions._cache] == [name]
        for name in names:
            assert (await api.trajectory(name, format="tokens"))["segments"] == segments


async def test_idempotency_key_works_after_eviction(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer), max_live_episodes=1) as api:
        await api.open("a")
        first = await api.post_act("a", headers={"Idempotency-Key": "k"})
        await api.open("b")
        again = await api.post_act("a", headers={"Idempotency-Key": "k"})
        assert again.json()["replayed"]
        assert again.json()["step"] == first.json()["step"] == 0


async def test_two_replicas_share_an_episode(tmp_path: Path, tokenizer: HFTokenizer):
    """A caller that names no steps can switch between replicas: they continue the same episode."""
    async with (
        serve(tmp_path, ScriptedEngine(tokenizer)) as one,
        serve(tmp_path, ScriptedEngine(tokenizer)) as two,
    ):
        await one.open(action_space=DISCRETE, sampling={"temperature": 0.0})
        steps = [(await replica.act(reward=1.0))["step"] for replica in (one, two, two, one, two, one, one)]
        assert steps == list(range(7))
        assert [(await replica.act(step=step))["step"] for replica, step in ((two, 7), (one, 8))] == [7, 8]
        assert (await one.get())["step"] == (await two.get())["step"] == 9
        assert (await two.get())["episode_return"] == 7.0
        assert (await one.client.post("/episode/e/end", json={"terminated": True})).status_code == 200
        ended = await two.post_act()
        assert (ended.status_code, ended.json()["code"]) == (409, "episode_ended")


async def test_a_retry_at_another_replica_gets_the_same_answer(tmp_path: Path, tokenizer: HFTokenizer):
    async with (
        serve(tmp_path, ScriptedEngine(tokenizer)) as one,
        serve(tmp_path, ScriptedEngine(tokenizer)) as two,
    ):
        await one.open(action_space=DISCRETE, sampling={"temperature": 1.0})
        for step in range(6):
            answers = await asyncio.gather(*(replica.act(step=step, reward=1.0) for replica in (one, two)))
            assert answers[0]["action"] == answers[1]["action"]
            assert answers[0]["logprob"] == answers[1]["logprob"]
        assert (await two.get())["episode_return"] == 6.0
        assert len((await one.trajectory())["steps"]) == 6


async def test_the_next_step_waits_for_one_in_flight_that_another_replica_has_taken(
    tmp_path: Path, tokenizer: HFTokenizer
):
    """A retry was answered by another replica, while the first attempt is still in flight here."""
    async with (
        serve(tmp_path, HeldEngine(tokenizer)) as one,
        serve(tmp_path, ScriptedEngine(tokenizer)) as two,
    ):
        assert isinstance(one.engine, HeldEngine)
        await one.open(action_space=DISCRETE, sampling={"temperature": 0.0})
        left = asyncio.create_task(one.act(step=0))
        await until(lambda: one.engine.num_held >= 1)
        first = await two.act(step=0)
        following = asyncio.create_task(one.post_act(step=1, observation="next"))
        await asyncio.sleep(0.05)
        assert not following.done()
        one.engine.release.set()
        assert (await following).json()["step"] == 1
        assert (await left)["action"] == first["action"]
        assert len((await one.trajectory())["steps"]) == 2


# --- without HTTP, so that a test controls what happens between two iterations of the event loop


@pytest.fixture
async def sessions(tokenizer: HFTokenizer) -> Sessions:
    sessions = Sessions(MemoryStore(), max_cached_episodes=8)
    sessions.serve(HeldEngine(tokenizer))
    await sessions.create("e", {}, b"body")
    return sessions


def call(observation: str = "look", **fields: Any) -> ActRequest:
    return ActRequest(Message(observation), observation.encode(), **fields)


async def test_a_retry_right_behind_the_caller_that_left_starts_anew(sessions: Sessions):
    engine = sessions.agent.engine
    assert isinstance(engine, HeldEngine)
    left = asyncio.create_task(sessions.act("e", call(step=0)))
    await until(lambda: engine.num_held == 1)
    left.cancel()
    await asyncio.sleep(0)  # the caller has left, but its act is not cancelled yet
    again = asyncio.create_task(sessions.act("e", call(step=0)))
    await until(lambda: engine.num_held == 2)
    engine.release.set()
    answer = await again
    assert (answer["step"], answer["replayed"]) == (0, False)
    assert engine.num_aborted == 1
    assert (await sessions.act("e", call(step=1)))["step"] == 1


async def test_what_needs_no_engine_is_answered_while_it_loads(tokenizer: HFTokenizer):
    store = MemoryStore()
    before = Sessions(store, max_cached_episodes=8)
    before.serve(ScriptedEngine(tokenizer))
    for name in ("e", "gone"):
        await before.create(name, {}, b"body")
    first = await before.act("e", call("zero", idempotency_key="k"))
    await before.delete("gone")
    loading = Sessions(store, max_cached_episodes=8)
    for retry in (call("zero", step=0), call("zero", idempotency_key="k"), call("zero", step=0, idempotency_key="k")):
        assert await loading.act("e", retry) == {**first, "replayed": True, "timing": dict.fromkeys(first["timing"], 0)}
    for request in (call("zero"), call("one", step=1), call("zero", idempotency_key="new")):
        with pytest.raises(EngineUnavailable):
            await loading.act("e", request)
    for request in (
        call("other", step=0),
        call("other", idempotency_key="k"),
        call("zero", step=1, idempotency_key="k"),
    ):
        with pytest.raises(Conflict) as conflict:
            await loading.act("e", request)
        assert conflict.value.code == "idempotency_mismatch"
    with pytest.raises(Gone):
        await loading.act("gone", call("zero", step=0))
    ended = await loading.end("e", ActRequest(Message(reward=2.0), b"end"), StopReason.TERMINATED)
    assert (ended.state.status, ended.state.episode_return) == ("ended", 2.0)
    assert (await before.end("e", ActRequest(Message(), b"again"), StopReason.ABORTED)) == ended


class SlowStore(MemoryStore):
    """Commits only after `release` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.release = asyncio.Event()
        self.num_commits = 0

    async def commit(self, commit: Commit) -> None:
        self.num_commits += 1
        await self.release.wait()
        await super().commit(commit)


async def test_started_commit_completes(tokenizer: HFTokenizer):
    """Neither a caller that leaves nor a timeout aborts an act whose commit has begun."""
    store = SlowStore()
    sessions = Sessions(store, max_cached_episodes=8)
    sessions.serve(ScriptedEngine(tokenizer))
    await sessions.create("e", {}, b"body")
    leaves = asyncio.create_task(sessions.act("e", call(step=0)))
    hurries = asyncio.create_task(sessions.act("e", call(step=0, timeout_s=0.001)))
    await until(lambda: store.num_commits == 1)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    await asyncio.sleep(0.01)
    store.release.set()
    assert (await hurries)["step"] == 0
    assert (await sessions.act("e", call(step=0)))["replayed"]
    assert (await sessions.get("e")).state.step == 1


class FlakyStore(MemoryStore):
    """Fails one commit as a lost connection does: `fault` "before" or "after" the commit takes effect.

    With "after_and_read", the next read fails too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fault = ""
        self.fails_read = False

    async def commit(self, commit: Commit) -> None:
        fault, self.fault = self.fault, ""
        if fault == "before":
            raise StoreUnavailable("gone")
        await super().commit(commit)
        if fault:
            self.fails_read = fault == "after_and_read"
            raise StoreUnavailable("gone")

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        fails_read, self.fails_read = self.fails_read, False
        if fails_read:
            raise StoreUnavailable("gone still")
        return await super().steps(episode_id, index)


@pytest.mark.parametrize("fault", ["before", "after_and_read"])
async def test_unknown_commit_result_is_resolved_by_the_retry(tokenizer: HFTokenizer, fault: str):
    store = FlakyStore()
    sessions = Sessions(store, max_cached_episodes=8)
    sessions.serve(ScriptedEngine(tokenizer))
    await sessions.create("e", {}, b"body")
    await sessions.act("e", call("zero", step=0))
    store.fault = fault
    with pytest.raises(StoreUnavailable):
        await sessions.act("e", call("one", step=1))
    assert (await sessions.act("e", call("one", step=1)))["replayed"] == (fault == "after_and_read")
    assert [row.message.observation for row in await store.steps("e")] == ["zero", "one"]
    assert (await sessions.act("e", call("two", step=2)))["step"] == 2


async def test_unknown_commit_result_is_resolved_by_rereading(tokenizer: HFTokenizer):
    store = FlakyStore()
    sessions = Sessions(store, max_cached_episodes=8)
    sessions.serve(ScriptedEngine(tokenizer))
    await sessions.create("e", {}, b"body")
    store.fault = "after"
    answer = await sessions.act("e", call("zero"))  # without a step: a retry would be a new act
    assert (answer["step"], answer["replayed"]) == (0, False)
    assert (await sessions.act("e", call("one")))["step"] == 1
    assert [row.message.observation for row in await store.steps("e")] == ["zero", "one"]


async def test_lost_race_returns_the_committed_step(tokenizer: HFTokenizer):
    store = MemoryStore()
    replicas = [Sessions(store, max_cached_episodes=8) for _ in range(2)]
    engines = [HeldEngine(tokenizer) for _ in replicas]
    for replica, engine in zip(replicas, engines, strict=True):
        replica.serve(engine)
    await replicas[0].create("e", {}, b"body")
    acts = [asyncio.create_task(replica.act("e", call("zero", step=0))) for replica in replicas]
    await until(lambda: all(engine.num_held for engine in engines))
    for engine in engines:
        engine.release.set()
    first, second = await asyncio.gather(*acts)
    assert sorted([first["replayed"], second["replayed"]]) == [False, True]
    assert {**first, "replayed": None, "timing": None} == {**second, "replayed": None, "timing": None}
    assert len(await store.steps("e")) == 1


async def test_streamed_act_that_loses_a_race_returns_409(tokenizer: HFTokenizer):
    """The caller has already received text. The text of a second attempt must not follow it."""
    store, engine = MemoryStore(), HeldEngine(tokenizer)
    replicas = [Sessions(store, max_cached_episodes=8) for _ in range(2)]
    replicas[0].serve(engine)
    replicas[1].serve(ScriptedEngine(tokenizer))
    await replicas[0].create("e", {}, b"body")
    received: list[str] = []
    streamed = replace(call("one"), sink=TextSink(lambda _, delta: received.append(delta)))
    losing = asyncio.create_task(replicas[0].act("e", streamed))
    await until(lambda: engine.num_held == 1)
    await replicas[1].act("e", call("zero"))
    engine.release.set()
    with pytest.raises(Conflict) as conflict:
        await losing
    assert (conflict.value.code, conflict.value.context["expected_step"]) == ("step_conflict", 1)
    assert "".join(received) == "ok"
    assert len(await store.steps("e")) == 1


async def test_a_streamed_act_whose_episode_ends_elsewhere_says_so(tokenizer: HFTokenizer):
    store, engine = MemoryStore(), HeldEngine(tokenizer)
    replicas = [Sessions(store, max_cached_episodes=8) for _ in range(2)]
    for replica, served in zip(replicas, (engine, ScriptedEngine(tokenizer)), strict=True):
        replica.serve(served)
    await replicas[0].create("e", {}, b"body")
    losing = asyncio.create_task(replicas[0].act("e", replace(call("one"), sink=TextSink(lambda *_: None))))
    await until(lambda: engine.num_held == 1)
    await replicas[1].end("e", ActRequest(Message(truncated=True), digest=b"end"), StopReason.TRUNCATED)
    engine.release.set()
    with pytest.raises(Conflict) as conflict:
        await losing
    assert conflict.value.code == "episode_ended"


async def test_an_act_without_a_step_never_takes_over_anothers_answer(tokenizer: HFTokenizer):
    """An equal body does not identify a retry: different callers may both send "look"."""
    store = MemoryStore()
    replicas = [Sessions(store, max_cached_episodes=8) for _ in range(2)]
    for replica in replicas:
        replica.serve(ScriptedEngine(tokenizer))
    await replicas[0].create("e", {}, b"body")
    await replicas[0].act("e", call())
    answers = [await replica.act("e", call()) for replica in (replicas[1], replicas[0], replicas[1])]
    assert [(answer["step"], answer["replayed"]) for answer in answers] == [(1, False), (2, False), (3, False)]


async def test_a_key_never_takes_over_the_answer_of_another_key(tokenizer: HFTokenizer):
    store = MemoryStore()
    replicas = [Sessions(store, max_cached_episodes=8) for _ in range(2)]
    for replica in replicas:
        replica.serve(ScriptedEngine(tokenizer))
    await replicas[0].create("e", {}, b"body")
    first = await replicas[1].act("e", call(idempotency_key="a"))
    stale = await replicas[0].act("e", call(idempotency_key="b"))
    again = await replicas[0].act("e", call(idempotency_key="a"))
    assert [(answer["step"], answer["replayed"]) for answer in (first, stale, again)] == [
        (0, False),
        (1, False),
        (0, True),
    ]


async def test_concurrent_loads_share_one_read(tokenizer: HFTokenizer):
    class CountingStore(MemoryStore):
        num_reads = 0

        async def trajectory(self, episode_id: str) -> Any:
            self.num_reads += 1
            await asyncio.sleep(0)
            return await super().trajectory(episode_id)

    store = CountingStore()
    sessions = Sessions(store, max_cached_episodes=1)
    sessions.serve(ScriptedEngine(tokenizer))
    await sessions.create("e", {}, b"body")
    await sessions.create("other", {}, b"body")
    store.num_reads = 0
    results = await asyncio.gather(*(sessions.act("e", call(step=0)) for _ in range(5)))
    assert store.num_reads == 1
    assert {answer["step"] for answer in results} == {0}


async def test_a_failed_read_is_not_remembered(tokenizer: HFTokenizer):
    sessions = Sessions(MemoryStore(), max_cached_episodes=4)
    sessions.serve(ScriptedEngine(tokenizer))
    for _ in range(2):
        with pytest.raises(Exception, match="no episode"):
            await sessions.act("e", call())
    await sessions.create("e", {}, b"body")
    assert (await sessions.act("e", call()))["step"] == 0


async def test_an_act_in_flight_is_not_evicted(tokenizer: HFTokenizer):
    engine = HeldEngine(tokenizer)
    sessions = Sessions(MemoryStore(), max_cached_episodes=1)
    sessions.serve(engine)
    await sessions.create("e", {}, b"body")
    acting = asyncio.create_task(sessions.act("e", call(step=0)))
    await until(lambda: engine.num_held == 1)
    for number in range(3):
        await sessions.create(f"other{number}", {}, b"body")
    joined = asyncio.create_task(sessions.act("e", call(step=0)))
    await asyncio.sleep(0.01)
    engine.release.set()
    assert (await acting)["step"] == (await joined)["step"] == 0
    assert engine.num_calls == 1


async def test_no_task_is_left_behind(tmp_path: Path, tokenizer: HFTokenizer):
    before = asyncio.all_tasks()
    for _ in range(3):
        async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
            await api.client.post("/episode", json={"episode_id": "e"})
            await api.act()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("make_store", [lambda _: MemoryStore(), lambda path: SQLStore(f"sqlite:///{path}/x")])
async def test_a_conflict_names_the_step_that_is_next(tmp_path: Path, tokenizer: HFTokenizer, make_store: Any):
    store: Store = make_store(tmp_path)
    await store.open()
    sessions = Sessions(store, max_cached_episodes=4)
    sessions.serve(ScriptedEngine(tokenizer))
    await sessions.create("e", {}, b"body")
    with pytest.raises(Conflict) as conflict:
        await sessions.act("e", call(step=5))
    assert (conflict.value.code, conflict.value.context["expected_step"]) == ("step_conflict", 0)
    with pytest.raises(StepTaken):
        await store.commit(Commit((await _any_step(sessions)), (await sessions.get("e")).state))
    await store.close()


async def _any_step(sessions: Sessions) -> Any:
    await sessions.act("e", call())
    return (await sessions.store.steps("e"))[0]
