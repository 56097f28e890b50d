"""Deletes episodes a certain time after they ended, and later removes their tombstones, in bounded batches."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.observability import logs, metrics
from service.store.base import Store, StoreUnavailable

_log = logs.get(__name__)

_BATCH = 100
"""Maximum number of episodes in one transaction."""
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 0.1, 60.0


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge did: the number of episodes deleted, and of tombstones removed."""

    num_episodes: int
    num_tombstones: int


async def purge(
    store: Store, retention_s: float, tombstone_s: float, forget: Callable[[str], None] = lambda _: None
) -> Purged:
    """Deletes the episodes that ended more than `retention_s` ago, and removes the tombstones of episodes that were
    deleted more than `tombstone_s` ago. Several replicas may do this at the same time.

    forget: called with the id of each deleted episode. Raises StoreUnavailable.
    """
    num_episodes = num_tombstones = 0
    now = time.time()
    while deleted := await store.delete_ended(now - retention_s, _BATCH):
        num_episodes += len(deleted)
        metrics.PURGED.labels("episode").inc(len(deleted))
        for episode_id in deleted:
            forget(episode_id)
    while num_removed := await store.remove_tombstones(now - tombstone_s, _BATCH):
        num_tombstones += num_removed
        metrics.PURGED.labels("tombstone").inc(num_removed)
    return Purged(num_episodes, num_tombstones)


class Retention:
    """Purges the store regularly. `forget`: called with the id of each deleted episode."""

    def __init__(self, store: Store, retention_s: float, tombstone_s: float, forget: Callable[[str], None]) -> None:
        self._store = store
        self._retention_s = retention_s
        self._tombstone_s = tombstone_s
        self._forget = forget

    async def run(self) -> None:
        """Purges until it is cancelled."""
        while True:
            try:
                purged = await purge(self._store, self._retention_s, self._tombstone_s, self._forget)
                if purged != Purged(0, 0):
                    _log.info("purged", num_episodes=purged.num_episodes, num_tombstones=purged.num_tombstones)
            except StoreUnavailable as error:
                _log.warning("purge_delayed", reason=str(error))
            except Exception as error:  # noqa: BLE001 - a bug must be seen in the log, and the task must go on
                _log.error("purge_failed", exc_info=error)
            shortest_s = min(self._retention_s, self._tombstone_s)
            await asyncio.sleep(min(max(shortest_s, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))
