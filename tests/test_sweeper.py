"""When idle episodes are looked for: what is opened while the store is asked is not slept over."""

import asyncio
import time

from service.store.base import StoreUnavailable
from service.sweeper import Sweeper


class Expiries:
    """A store's answers to `next_expiry`, each given when it is let go."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[asyncio.Future[float | None]] = asyncio.Queue()
        self.num_ended = 0

    async def next_expiry(self) -> float | None:
        answer = asyncio.get_running_loop().create_future()
        self.asked.put_nowait(answer)
        return await answer

    async def end(self) -> bool:
        self.num_ended += 1
        return True


async def test_what_is_opened_while_the_store_is_asked_is_not_slept_over():
    expiries = Expiries()
    sweeper = Sweeper(expiries.next_expiry, expiries.end)
    running = asyncio.create_task(sweeper.run())
    (await expiries.asked.get()).set_result(time.time() - 1)  # one is over
    late = await expiries.asked.get()
    assert expiries.num_ended == 1
    sweeper.expect(time.time() + 60)
    late.set_result(None)  # as the store was before that one
    async with asyncio.timeout(5):
        again = await expiries.asked.get()
    again.cancel()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_it_sleeps_while_nothing_can_expire():
    expiries = Expiries()
    sweeper = Sweeper(expiries.next_expiry, expiries.end)
    running = asyncio.create_task(sweeper.run())
    (await expiries.asked.get()).set_result(time.time() + 60)
    await asyncio.sleep(0.01)
    sweeper.expect(None)
    sweeper.expect(time.time() + 120)
    await asyncio.sleep(0.1)
    assert expiries.asked.empty()
    sweeper.expect(time.time() + 30)
    async with asyncio.timeout(5):
        (await expiries.asked.get()).cancel()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_store_that_fails_is_asked_again(monkeypatch):
    monkeypatch.setattr("service.sweeper._RETRY_S", 0.01)
    expiries = Expiries()
    running = asyncio.create_task(Sweeper(expiries.next_expiry, expiries.end).run())
    (await expiries.asked.get()).set_exception(StoreUnavailable("down"))
    async with asyncio.timeout(5):
        (await expiries.asked.get()).cancel()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
