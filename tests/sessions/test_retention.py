"""Retention: ended episodes are deleted after a time, and their tombstones later, without harm to forks."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.engine.tokenizer import HFTokenizer
from service.sessions import retention
from service.sessions.retention import Purged, purge
from service.store.sql import SQLStore
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import StopReason
from tests.store.test_stores import commit, fork, record
from tests.support.serving import serve, until


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return request.getfixturevalue("new_database")()
    return f"sqlite:///{tmp_path}/episodic.db"


@pytest.fixture
async def store(url: str) -> AsyncIterator[SQLStore]:
    async with SQLStore(url) as opened:
        yield opened


async def play(store: SQLStore, name: str, *, ended_s_ago: float | None = None) -> None:
    """Opens an episode and takes one step. It ends if `ended_s_ago` is given."""
    await store.create(record(name, metadata={"env": "lake"}))
    await store.commit(commit(0, name))
    if ended_s_ago is not None:
        end = commit(1, name, ends=StopReason.TERMINATED)
        await store.commit(replace(end, state=replace(end.state, ended_at=time.time() - ended_s_ago)))


async def status(store: SQLStore, name: str) -> str | None:
    found = await store.episode(name)
    return found and ("deleted" if found.deleted else found.state.status)


async def test_only_old_ended_episodes_are_deleted_and_tombstones_go_later(
    store: SQLStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retention, "_BATCH", 2)
    for number in range(5):
        await play(store, f"old{number}", ended_s_ago=100.0)
    await play(store, "young", ended_s_ago=1.0)
    await play(store, "active")
    forgotten: list[str] = []
    assert await purge(store, 50.0, 60.0, forgotten.append) == Purged(5, 0)
    assert sorted(forgotten) == [f"old{number}" for number in range(5)]
    assert [await status(store, name) for name in ("old0", "young", "active")] == ["deleted", "ended", "active"]
    assert await store.steps("old0") == []
    assert await purge(store, 50.0, 60.0) == Purged(0, 0)
    assert await purge(store, 50.0, -1.0) == Purged(0, 5)
    assert [await status(store, name) for name in ("old0", "young", "active")] == [None, "ended", "active"]
    await store.create(record("old0"))  # the id can be used again


async def test_steps_that_a_fork_reads_stay_and_keep_the_id_of_their_episode(store: SQLStore):
    await play(store, "parent", ended_s_ago=100.0)
    await store.fork([fork("child", "parent", 1)])
    assert await purge(store, 50.0, -1.0) == Purged(1, 0)
    assert await status(store, "parent") == "deleted", "its id must not be used again"
    assert len(await store.steps("child")) == 1
    await store.commit(commit(1, "child"))
    await store.delete("child")
    assert await purge(store, 50.0, -1.0) == Purged(0, 2)
    assert await store.steps("parent") == await store.steps("child") == []


async def test_replicas_that_purge_together_delete_each_episode_once(store: SQLStore, url: str):
    for number in range(20):
        await play(store, f"e{number}", ended_s_ago=100.0)
    async with SQLStore(url) as other:
        results = await asyncio.gather(*(purge(one, 50.0, -1.0) for one in (store, other, store, other)))
        results.append(await purge(store, 50.0, -1.0))
    assert sum(one.num_episodes for one in results) == sum(one.num_tombstones for one in results) == 20


async def test_a_service_purges_if_retention_is_set(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer), retention_s=0.05) as api:
        await api.open("e")
        await api.open("active")
        await api.act("e", None, terminated=True)
        path = api.client.build_request("GET", "/episode/e").url

        async def code() -> int:
            return (await api.client.get(path)).status_code

        async with asyncio.timeout(20):
            while await code() != 410:  # noqa: ASYNC110 - no event signals this state
                await asyncio.sleep(0.01)
        assert (await api.client.get("/episode/active")).status_code == 200
        await until(lambda: "e" not in [one.episode_id for one in api.app.state.services.sessions._cache])
        metrics = (await api.client.get("/metrics")).text
    assert 'agent_purged_total{kind="episode"}' in metrics


def test_the_command_needs_a_retention_and_says_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))

    async def fill() -> None:
        async with SQLStore(f"sqlite:///{tmp_path / 'episodic.db'}") as store:
            await play(store, "e", ended_s_ago=100.0)

    asyncio.run(fill())
    assert CliRunner().invoke(app, ["purge"]).exit_code == 2
    ran = CliRunner().invoke(app, ["purge", "--retention-s", "50"])
    assert (ran.exit_code, ran.stdout) == (
        0,
        "Deleted 1 episodes and removed 0 tombstones.\nRemoved 0 unused versions of adapters.\n",
    )


async def test_a_tiny_retention_does_not_query_the_store_without_a_pause(monkeypatch: pytest.MonkeyPatch):
    pauses: asyncio.Queue[float] = asyncio.Queue()
    pause = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.put_nowait(seconds)
        await pause(0.01)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    running = asyncio.create_task(retention.Retention(MemoryStore(), 1e-9, 1e-9, lambda _: None).run())
    assert await pauses.get() > 0.01
    running.cancel()
