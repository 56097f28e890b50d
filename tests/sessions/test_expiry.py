"""Tests of idle expiry: when the store is queried, and that one failure does not block other episodes."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from service.errors import Conflict
from service.sessions.expiry import Expiry
from service.store.base import StoreUnavailable
from service.testing.memory_store import MemoryStore


class Expiries(MemoryStore):
    """The test answers each call of `next_expiry` by a future in `queries`. `due` are the ids of expired episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: asyncio.Queue[asyncio.Future[float | None]] = asyncio.Queue()
        self.due: list[str] = []
        self.ended: list[str] = []

    async def next_expiry(self) -> float | None:
        answer = asyncio.get_running_loop().create_future()
        self.queries.put_nowait(answer)
        return await answer

    async def expired(self, now: float, limit: int) -> list[str]:
        return self.due[:limit]

    async def end(self, episode_id: str) -> None:
        if episode_id.startswith("busy"):
            raise Conflict("episode_busy", "later")
        if episode_id.startswith("broken"):
            raise RuntimeError("broken")
        self.due.remove(episode_id)
        self.ended.append(episode_id)


@pytest.fixture
def expiries() -> Expiries:
    return Expiries()


@pytest.fixture(autouse=True)
async def expiry(expiries: Expiries) -> AsyncIterator[Expiry]:
    """Runs the expiry loop during the test."""
    instance = Expiry(expiries, expiries.end)
    task = asyncio.create_task(instance.run())
    yield instance
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_is_opened_while_the_store_is_asked_is_not_slept_over(expiries: Expiries, expiry: Expiry):
    expiries.due = ["over"]
    (await expiries.queries.get()).set_result(time.time() - 1)
    late = await expiries.queries.get()
    assert expiries.ended == ["over"]
    expiry.expect(time.time() + 60)
    late.set_result(None)  # the query has missed the new episode
    async with asyncio.timeout(5):
        again = await expiries.queries.get()
    again.cancel()


async def test_it_sleeps_while_nothing_can_expire(expiries: Expiries, expiry: Expiry):
    (await expiries.queries.get()).set_result(time.time() + 60)
    await asyncio.sleep(0.01)
    expiry.expect(None)
    expiry.expect(time.time() + 120)
    await asyncio.sleep(0.1)
    assert expiries.queries.empty()
    expiry.expect(time.time() + 30)
    async with asyncio.timeout(5):
        (await expiries.queries.get()).cancel()


async def test_an_episode_that_another_replica_opened_is_found(expiries: Expiries, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.sessions.expiry._LONGEST_SLEEP_S", 0.01)
    (await expiries.queries.get()).set_result(None)
    expiries.due = ["theirs"]
    async with asyncio.timeout(5):
        (await expiries.queries.get()).set_result(time.time() - 1)
        (await expiries.queries.get()).cancel()
    assert expiries.ended == ["theirs"]


async def test_a_store_that_fails_is_asked_again(expiries: Expiries, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.sessions.expiry._RETRY_S", 0.01)
    (await expiries.queries.get()).set_exception(StoreUnavailable("down"))
    async with asyncio.timeout(5):
        (await expiries.queries.get()).cancel()


async def test_what_cannot_end_keeps_no_other_from_it(expiries: Expiries, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.sessions.expiry._RETRY_S", 0.01)
    expiries.due = [*(f"busy{n}" for n in range(300)), *(f"broken{n}" for n in range(300)), "fine"]
    (await expiries.queries.get()).set_result(time.time() - 1)
    async with asyncio.timeout(5):
        again = await expiries.queries.get()
    assert expiries.ended == ["fine"]
    again.cancel()


async def test_a_bug_does_not_end_the_expiry(expiries: Expiries, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.sessions.expiry._RETRY_S", 0.01)
    (await expiries.queries.get()).set_exception(TypeError("a bug"))
    expiries.due = ["over"]
    async with asyncio.timeout(5):
        (await expiries.queries.get()).set_result(time.time() - 1)
        (await expiries.queries.get()).cancel()
    assert expiries.ended == ["over"]
