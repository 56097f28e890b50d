"""Caches episodes in memory. The cache is bounded, and evicts the least recently used (LRU) episode first.

An episode is dropped whenever it may differ from the store's copy. The next call loads it again.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from service.agent.options import restored
from service.engine.base import Engine
from service.errors import episode_deleted, episode_not_found
from service.observability import metrics
from service.sessions.episode import Episode
from service.store.base import Store
from service.trajectory import Step, StoredEpisode, public_id


class EpisodeCache:
    """Contains at most `max_num` episodes.

    An episode with an act in flight is not evicted, so the cache may be larger for a while.
    """

    def __init__(self, store: Store, max_num: int, engine: Callable[[], Engine]) -> None:
        """`engine`: returns the current engine. Raises EngineUnavailable while there is none."""
        self._store = store
        self._max_num = max_num
        self._engine = engine
        self._episodes: OrderedDict[str, Episode] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Episode]] = {}

    def __len__(self) -> int:
        return len(self._episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self._episodes.values())

    def peek(self, episode_id: str) -> Episode | None:
        """Returns the episode if it is cached, without marking it as recently used."""
        return self._episodes.get(episode_id)

    async def find(self, episode_id: str) -> Episode:
        """Returns the episode, and loads it from the store if it is not cached.

        Concurrent callers share one load (single-flight). Raises NotFound, Gone, EngineUnavailable, StoreUnavailable.
        """
        if episode := self._episodes.get(episode_id):
            self._episodes.move_to_end(episode_id)
            return episode
        task = self._loading.get(episode_id)
        if task is None:
            task = self._loading[episode_id] = asyncio.create_task(self._load(episode_id))
            task.add_done_callback(partial(self._loaded, episode_id))
        return await asyncio.shield(task)

    def keep(self, episode: Episode) -> Episode:
        """Adds the episode to the cache.

        Returns the cached episode. It is another object if the episode was loaded by another call meanwhile.
        """
        cached = self._episodes.setdefault(episode.episode_id, episode)
        for episode_id in list(islice(self._episodes, max(len(self._episodes) - self._max_num, 0))):
            if self._episodes[episode_id].in_flight is None:
                del self._episodes[episode_id]
        metrics.CACHED_EPISODES.set(len(self._episodes))
        return cached

    def drop(self, episode_id: str) -> None:
        """Removes the episode from the cache, so that the next call loads it from the store."""
        self._episodes.pop(episode_id, None)
        metrics.CACHED_EPISODES.set(len(self._episodes))

    def drop_idle(self, episode_id: str) -> None:
        """Removes the episode from the cache, unless an act is in flight, which drops it if its commit fails."""
        episode = self._episodes.get(episode_id)
        if episode and episode.in_flight is None:
            self.drop(episode_id)

    async def stored(self, episode_id: str) -> StoredEpisode:
        """Reads the episode from the store, without its steps. Raises NotFound, Gone, StoreUnavailable."""
        return self._existing(episode_id, await self._store.episode(episode_id))

    async def trajectory(
        self, episode_id: str, first: int = 0, last: int | None = None
    ) -> tuple[StoredEpisode, list[Step]]:
        """Reads the episode and its steps from index `first` to `last` from the store.

        Raises NotFound, Gone, StoreUnavailable.
        """
        is_whole = first == 0 and last is None
        found = await (
            self._store.trajectory(episode_id) if is_whole else self._store.trajectory(episode_id, first, last)
        )
        stored, steps = found or (None, [])
        return self._existing(episode_id, stored), steps

    def _existing(self, episode_id: str, stored: StoredEpisode | None) -> StoredEpisode:
        if stored is None:
            raise episode_not_found(public_id(episode_id))
        if stored.deleted:
            self.drop_idle(episode_id)
            raise episode_deleted(public_id(episode_id))
        return stored

    def _loaded(self, episode_id: str, task: asyncio.Task[Episode]) -> None:
        del self._loading[episode_id]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: asyncio would log it if all callers have left

    async def _load(self, episode_id: str) -> Episode:
        engine = self._engine()
        stored, steps = await self.trajectory(episode_id)
        options = await restored(stored.config.request, engine.info)
        return self.keep(Episode(stored, options, engine.history(), steps))
