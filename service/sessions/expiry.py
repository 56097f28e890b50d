"""Ends idle episodes: sleeps until the next idle timeout expires, and then ends the expired episodes."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable

from service.errors import Conflict
from service.observability import logs, metrics
from service.store.base import Store, StoreUnavailable

_log = logs.get(__name__)

_LONGEST_SLEEP_S = 30.0
"""Maximum time between two queries of the store. Other replicas also open episodes, which only a query finds."""
_RETRY_S = 1.0
_BATCH = 256


class Expiry:
    """Ends the expired episodes of the store.

    expire: ends the episode with this id. It raises Conflict while an act is in flight, and is then called again later.
    """

    def __init__(self, store: Store, expire: Callable[[str], Awaitable[None]]) -> None:
        self._store = store
        self._expire = expire
        self._next = math.inf
        self._wake = asyncio.Event()

    def expect(self, expires_at: float | None) -> None:
        """Must be called when an episode is opened, with the Unix time at which it expires; None for never."""
        if expires_at is not None and expires_at < self._next:
            self._wake.set()

    async def run(self) -> None:
        """Ends expired episodes until it is cancelled."""
        while True:
            self._wake.clear()
            # The query below may miss an episode that is opened meanwhile. With inf, `expect` then wakes the loop.
            self._next = math.inf
            try:
                self._next = await self._store.next_expiry() or math.inf
                if self._next <= time.time():
                    if not await self._end_expired():
                        await asyncio.sleep(_RETRY_S)
                    continue
            except StoreUnavailable as error:
                _log.warning("expiry_delayed", reason=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            except Exception:  # noqa: BLE001 - this task must not end while the service runs
                _log.exception("expiry_failed")
                metrics.UNEXPECTED_FAILURES.inc()
                await asyncio.sleep(_RETRY_S)
                continue
            wait_s = min(self._next - time.time(), _LONGEST_SLEEP_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)

    async def _end_expired(self) -> bool:
        """Ends the expired episodes. Returns whether all of them have ended."""
        remaining: set[str] = set()
        while expired := await self._store.expired(time.time(), _BATCH + len(remaining)):
            due = [episode_id for episode_id in expired if episode_id not in remaining]
            if not due:
                return False
            for episode_id in due:
                try:
                    await self._expire(episode_id)
                except Conflict:
                    remaining.add(episode_id)
                except Exception as failure:  # noqa: BLE001 - one failure must not block other episodes
                    _log.warning("episode_expiry_failed", episode_id=episode_id, reason=repr(failure))
                    remaining.add(episode_id)
        return True
