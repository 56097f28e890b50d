"""Owns the end of idle episodes: looks for them at the moment when the next one's time is over, and now and then."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable

from service.errors import Conflict
from service.observability import logs
from service.store.base import Store, StoreUnavailable

_log = logs.get(__name__)

_LONGEST_SLEEP_S = 30.0
"""Other replicas open episodes too, of which nobody tells this one."""
_RETRY_S = 1.0
_BATCH = 256


class Expiry:
    """Ends the store's expired episodes by `expire`, which raises Conflict for one that an act keeps for the moment."""

    def __init__(self, store: Store, expire: Callable[[str], Awaitable[None]]) -> None:
        self._store = store
        self._expire = expire
        self._next = math.inf
        self._sooner = asyncio.Event()

    def expect(self, expires_at: float | None) -> None:
        """An episode was opened that expires then."""
        if expires_at is not None and expires_at < self._next:
            self._sooner.set()

    async def run(self) -> None:
        """Sweeps for ever."""
        while True:
            self._sooner.clear()
            self._next = math.inf  # whatever is opened while the store is asked counts as sooner
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
            wait_s = min(self._next - time.time(), _LONGEST_SLEEP_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sooner.wait(), wait_s)

    async def _end_expired(self) -> bool:
        """Whether it ended all that expired."""
        left: set[str] = set()
        while found := await self._store.expired(time.time(), _BATCH + len(left)):
            due = [episode_id for episode_id in found if episode_id not in left]
            if not due:
                return False
            for episode_id in due:
                try:
                    await self._expire(episode_id)
                except Conflict:
                    left.add(episode_id)
                except Exception as failure:  # noqa: BLE001 - one that cannot end keeps no other from it
                    _log.warning("episode_expiry_failed", episode_id=episode_id, reason=repr(failure))
                    left.add(episode_id)
        return True
