"""Owns when idle episodes are looked for: at the moment when the next one's time is over, and never before."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable

from service import logs
from service.store.base import StoreUnavailable

_log = logs.get(__name__)

_LONGEST_SLEEP_S = 86_400.0
_RETRY_S = 1.0


class Sweeper:
    """Calls `end_expired`, which says whether all are ended, when it is time. `next_expiry` gives when that is, in Unix
    seconds, None for never."""

    def __init__(
        self, next_expiry: Callable[[], Awaitable[float | None]], end_expired: Callable[[], Awaitable[bool]]
    ) -> None:
        self._next_expiry = next_expiry
        self._end_expired = end_expired
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
                self._next = await self._next_expiry() or math.inf
                if self._next <= time.time():
                    if not await self._end_expired():
                        await asyncio.sleep(_RETRY_S)
                    continue
            except StoreUnavailable as error:
                _log.warning("idle episodes cannot be ended yet", reason=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            wait_s = min(self._next - time.time(), _LONGEST_SLEEP_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sooner.wait(), wait_s)
