"""`timeout_s` of an act limits its time in the queue, in the engine, in the store, and behind another replica."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from service.store.base import Commit
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Step, StoredEpisode
from tests.support.serving import HeldEngine, Served, serve, until

pytestmark = pytest.mark.store("sqlite")
"""These tests use stores in memory, so one kind of database is enough."""


@asynccontextmanager
async def two_replicas(folder: Path, tokenizer: HFTokenizer) -> AsyncIterator[tuple[Served, Served]]:
    """Runs two replicas on one store: a slow one, whose engine does not answer, and a fast one."""
    store = MemoryStore()
    async with (
        serve(folder / "slow", HeldEngine(tokenizer), store=store) as slow,
        serve(folder / "fast", ScriptedEngine(tokenizer), store=store) as fast,
    ):
        yield slow, fast
        slow.engine.release.set()


async def test_an_act_that_waits_for_a_slot_is_bounded(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer), max_running_acts=1, max_queued_acts=4) as api:
        await api.open("first")
        await api.open("second")
        running = asyncio.create_task(api.post_act("first"))
        await until(lambda: api.engine.num_held == 1)
        waited = await api.post_act("second", timeout_s=0.05)
        assert (waited.status_code, waited.json()["code"]) == (504, "deadline_exceeded")
        api.engine.release.set()
        assert (await running).status_code == 200
        assert (await api.act("second"))["step"] == 0, "the late act was stored"


async def test_an_act_that_another_replica_overtook_is_bounded(tmp_path: Path, tokenizer: HFTokenizer):
    async with two_replicas(tmp_path, tokenizer) as (slow, fast):
        await fast.open()
        held = asyncio.create_task(slow.post_act(step=0))
        await until(lambda: slow.engine.num_held == 1)
        await fast.act(step=0)
        try:
            async with asyncio.timeout(5):
                answer = await slow.post_act(step=1, timeout_s=0.1)
            assert answer.status_code == 504
        finally:
            slow.engine.release.set()
            await held


class SlowReads(MemoryStore):
    """A store whose reads and commits wait until `release` is set. `slow` names the methods that wait."""

    def __init__(self, *slow: str) -> None:
        super().__init__()
        self.slow = slow
        self.release = asyncio.Event()
        self.release.set()
        self.num_commits = 0

    async def _wait(self, method: str) -> None:
        if method in self.slow:
            await self.release.wait()

    async def episode(self, episode_id: str) -> StoredEpisode | None:
        await self._wait("episode")
        return await super().episode(episode_id)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        await self._wait("steps")
        return await super().steps(episode_id, index)

    async def trajectory(self, episode_id: str) -> tuple[StoredEpisode, list[Step]] | None:
        await self._wait("trajectory")
        return await super().trajectory(episode_id)

    async def commit(self, commit: Commit) -> None:
        self.num_commits += 1
        await self._wait("commit")
        await super().commit(commit)


@pytest.mark.parametrize("form", ["act", "stream", "batch"])
@pytest.mark.parametrize(
    ("slow", "fields"),
    [
        ("trajectory", {"episode_id": "evicted", "step": 1}),
        ("trajectory", {"episode_id": "unknown"}),
        ("steps", {"episode_id": "cached", "step": 0}),
        ("episode", {"episode_id": "cached", "step": 0}),
        ("episode", {"episode_id": "cached", "step": 9}),
    ],
    ids=["load", "load of an unknown episode", "a retry", "a retry's episode", "a conflict"],
)
async def test_each_read_of_the_store_is_bounded(
    tmp_path: Path, tokenizer: HFTokenizer, slow: str, fields: dict[str, Any], form: str
):
    store = SlowReads(slow)
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store, max_live_episodes=1) as api:
        await api.open("evicted")
        await api.act("evicted")
        await api.open("cached")
        await api.act("cached")
        store.release.clear()
        body = {"observation": "look", "timeout_s": 0.1, **fields}
        try:
            async with asyncio.timeout(5):
                if form == "batch":
                    answer = await api.client.post("/act/batch", json={"acts": [body]})
                    problem = answer.json()["results"][0]
                else:
                    headers = {"Accept": "text/event-stream"} if form == "stream" else {}
                    problem = (await api.client.post("/act", json=body, headers=headers)).json()
            assert problem["code"] == "deadline_exceeded"
        finally:
            store.release.set()
        assert [(await api.get(name))["step"] for name in ("evicted", "cached")] == [1, 1]


async def test_a_retry_that_joins_an_act_has_its_own_deadline(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer)) as api:
        await api.open()
        first = asyncio.create_task(api.post_act(step=0))
        await until(lambda: api.engine.num_held == 1)
        assert (await api.post_act(step=0, timeout_s=0.05)).status_code == 504
        api.engine.release.set()
        assert (await first).status_code == 200


async def test_a_commit_that_fails_after_the_deadline_is_not_repeated(tmp_path: Path, tokenizer: HFTokenizer):
    """Another replica has taken the step. The act would have to be decided again, but its time is up."""
    store = SlowReads("commit")
    async with (
        serve(tmp_path / "slow", ScriptedEngine(tokenizer), store=store) as slow,
        serve(tmp_path / "fast", ScriptedEngine(tokenizer), store=store) as fast,
    ):
        await slow.open()
        store.release.clear()
        late = asyncio.create_task(slow.post_act(timeout_s=0.1))
        await until(lambda: store.num_commits == 1)
        store.slow = ()
        await fast.act()
        await asyncio.sleep(0.2)
        store.release.set()
        answer = await late
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
        assert (await fast.get())["step"] == 1


async def test_a_commit_that_began_is_awaited_beyond_the_deadline(tmp_path: Path, tokenizer: HFTokenizer):
    """The caller must learn whether the step was committed, so the answer may be late."""
    store = SlowReads("commit")
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store) as api:
        await api.open()
        store.release.clear()
        late = asyncio.create_task(api.post_act(step=0, timeout_s=0.05))
        await until(lambda: store.num_commits == 1)
        await asyncio.sleep(0.2)
        store.release.set()
        assert (await late).status_code == 200
        assert (await api.act(step=0))["replayed"]
