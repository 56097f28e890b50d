"""Owns the episodes in memory: a cache of the store, bounded and least recently used first out.

One is dropped whenever it may differ from the store's copy, and the next touch reads it again.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice

from service.agent.options import restored
from service.engine.base import EngineInfo
from service.errors import episode_deleted, episode_not_found
from service.observability import metrics
from service.sessions.episode import Episode
from service.store.base import Store
from service.trajectory import EpisodeRecord, Step, public_id


class LiveEpisodes:
    """At most `max_num` episodes of the store's, but for those whose act is in flight."""

    def __init__(self, store: Store, max_num: int, info: Callable[[], EngineInfo]) -> None:
        """`info`: the engine's; raises EngineUnavailable while there is none."""
        self._store = store
        self._max_num = max_num
        self._info = info
        self._episodes: OrderedDict[str, Episode] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Episode]] = {}

    def __len__(self) -> int:
        return len(self._episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self._episodes.values())

    def peek(self, episode_id: str) -> Episode | None:
        """The episode if it is in memory."""
        return self._episodes.get(episode_id)

    async def find(self, episode_id: str) -> Episode:
        """The episode, read from the store if it is not in memory; concurrent callers share one read. Raises NotFound,
        Gone, EngineUnavailable."""
        if episode := self._episodes.get(episode_id):
            self._episodes.move_to_end(episode_id)
            return episode
        task = self._loading.get(episode_id)
        if task is None:
            task = self._loading[episode_id] = asyncio.create_task(self._load(episode_id))
            task.add_done_callback(lambda _: self._loading.pop(episode_id, None))
        return await asyncio.shield(task)

    def keep(self, episode: Episode) -> Episode:
        """The live one: it may have been read as it was being opened."""
        kept = self._episodes.setdefault(episode.episode_id, episode)
        for episode_id in list(islice(self._episodes, max(len(self._episodes) - self._max_num, 0))):
            if self._episodes[episode_id].flight is None:
                del self._episodes[episode_id]
        metrics.LIVE_EPISODES.set(len(self._episodes))
        return kept

    def drop(self, episode_id: str) -> None:
        self._episodes.pop(episode_id, None)
        metrics.LIVE_EPISODES.set(len(self._episodes))

    async def record(self, episode_id: str) -> EpisodeRecord:
        """What the store has of it but for its steps. Raises NotFound, Gone."""
        record = await self._store.episode(episode_id)
        if record is None:
            raise episode_not_found(public_id(episode_id))
        if record.deleted:
            raise episode_deleted(public_id(episode_id))
        return record

    async def trajectory(self, episode_id: str) -> tuple[EpisodeRecord, list[Step]]:
        """All that the store has of it. Raises NotFound, Gone."""
        found = await self._store.trajectory(episode_id)
        if found is None:
            raise episode_not_found(public_id(episode_id))
        if found[0].deleted:
            raise episode_deleted(public_id(episode_id))
        return found

    async def _load(self, episode_id: str) -> Episode:
        info = self._info()
        record, steps = await self.trajectory(episode_id)
        return self.keep(Episode(record, await restored(record.config.request, info), steps))
