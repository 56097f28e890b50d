"""Tests of the episode cache: which episodes are evicted, and how often an episode is loaded."""

import asyncio
from collections.abc import Callable

import pytest

from service.engine.tokenizer import HFTokenizer
from service.sessions.acts import ActRequest
from service.sessions.sessions import Sessions
from service.store.base import Store
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Message, Step, StoredEpisode
from tests.support.serving import HeldEngine, until


class CountingStore(MemoryStore):
    """Records the ids of the episodes that are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    async def trajectory(self, episode_id: str) -> tuple[StoredEpisode, list[Step]] | None:
        self.loads.append(episode_id)
        await asyncio.sleep(0)
        return await super().trajectory(episode_id)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


async def sessions_over(
    store: Store, tokenizer: HFTokenizer, size: int, engine: Callable[[HFTokenizer], ScriptedEngine] = ScriptedEngine
) -> Sessions:
    sessions = Sessions(store, max_cached_episodes=size)
    sessions.serve(engine(tokenizer))
    return sessions


def act(step: int) -> ActRequest:
    return ActRequest(Message(f"observation {step}"), f"{step}".encode(), step)


async def test_the_least_recently_used_is_evicted_first(store: CountingStore, tokenizer: HFTokenizer):
    sessions = await sessions_over(store, tokenizer, 2)
    for name in ("a", "b"):
        await sessions.create(name, {}, b"body")
    await sessions.act("a", act(0))
    await sessions.create("c", {}, b"body")
    assert [episode.episode_id for episode in sessions._cache] == ["a", "c"], "b is the least recently used"
    await sessions.act("a", act(1))
    assert store.loads == []
    await sessions.act("b", act(0))
    assert store.loads == ["b"]
    assert {episode.episode_id for episode in sessions._cache} == {"a", "b"}


async def test_an_episode_with_an_act_in_flight_stays_beyond_the_bound(store: CountingStore, tokenizer: HFTokenizer):
    sessions = await sessions_over(store, tokenizer, 1, HeldEngine)
    engine = sessions.agent.engine
    assert isinstance(engine, HeldEngine)
    await sessions.create("busy", {}, b"body")
    acting = asyncio.create_task(sessions.act("busy", act(0)))
    await until(lambda: engine.num_held == 1)
    await sessions.create("other", {}, b"body")
    assert sessions._cache.peek("busy") is not None
    engine.release.set()
    assert (await acting)["step"] == 0
    await sessions.act("other", act(0))
    await sessions.create("third", {}, b"body")
    assert [episode.episode_id for episode in sessions._cache] == ["third"], (
        "the episode must be evicted once its act has ended"
    )


async def test_concurrent_callers_share_one_load(store: CountingStore, tokenizer: HFTokenizer):
    sessions = await sessions_over(store, tokenizer, 1)
    await sessions.create("a", {}, b"body")
    await sessions.create("b", {}, b"body")
    answers = await asyncio.gather(*(sessions.act("a", act(0)) for _ in range(8)))
    assert store.loads == ["a"]
    assert sorted(answer["replayed"] for answer in answers) == [False] + [True] * 7


async def test_a_load_that_fails_is_repeated_by_the_next_call(
    store: CountingStore, tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
):
    sessions = await sessions_over(store, tokenizer, 1)
    await sessions.create("a", {}, b"body")
    await sessions.create("b", {}, b"body")
    with monkeypatch.context() as broken:

        async def fail(episode_id: str) -> None:
            raise RuntimeError("broken")

        broken.setattr(store, "trajectory", fail)
        with pytest.raises(RuntimeError):
            await sessions.act("a", act(0))
    assert (await sessions.act("a", act(0)))["step"] == 0
