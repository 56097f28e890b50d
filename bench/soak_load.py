"""The load of a soak test: episodes of every kind, concurrently. The number of stored episodes stays bounded."""

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing

from service.client import Act, AsyncClient, AsyncEpisode, EpisodicError, StepConflict, calls
from service.client.errors import ApiError

NUM_KEPT = 300
"""The number of ended episodes to keep. Older ones are deleted, because stored episodes would look like growth."""
_NUM_LANES = 12
_NUM_STEPS = 8
_IDLE_TTL_S = 3.0
_TIDY_S = 5.0
_DISCRETE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}


class Load:
    """Plays until `stop_at` (time.monotonic()). `counts` has what it did, `failures` the unexpected errors."""

    def __init__(self, client: AsyncClient, seed: int, stop_at: float) -> None:
        self._client = client
        self._random = random.Random(seed)  # noqa: S311 - not used for secrets
        self._stop_at = stop_at
        self._tidying = asyncio.Semaphore(8)
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(_NUM_LANES):
                group.create_task(self._lane())
            group.create_task(self._tidy())
            group.create_task(self._export())

    async def _lane(self) -> None:
        lives = (self._play, self._play, self._write, self._together, self._fork, self._leave)
        while time.monotonic() < self._stop_at:
            life = self._random.choice(lives)
            try:
                await life()
            except EpisodicError as error:
                self.failures[f"{life.__name__[1:]}: {error}"[:200]] += 1
                await asyncio.sleep(0.1)

    async def _open(self, **fields: object) -> AsyncEpisode:
        self.counts["episodes"] += 1
        return await self._client.episode(instructions="Play on.", tags=["soak"], **fields)  # type: ignore[arg-type]

    async def _act(self, episode: AsyncEpisode, **fields: object) -> Act:
        self.counts["acts"] += 1
        observation = f"row {self._random.randrange(4)}, column {self._random.randrange(4)}"
        return await episode.act(observation, **fields)  # type: ignore[arg-type]

    async def _play(self) -> None:
        """An episode with discrete actions up to a terminal state. Half of these episodes are deleted at once."""
        episode = await self._open(action_space=_DISCRETE)
        for step in range(_NUM_STEPS):
            await self._act(episode, reward=1.0 if step else None)
        await self._act(episode, reward=1.0, terminated=True)
        if self._random.random() < 0.5:
            await episode.delete()

    async def _write(self) -> None:
        """An episode with text actions. Before half of the acts, a streamed act is started and abandoned."""
        episode = await self._open(sampling={"max_tokens": 24})
        for _ in range(_NUM_STEPS // 2):
            if self._random.random() < 0.5:
                await self._abandon(episode)
            await self._act_when_free(episode)
        await episode.end(success=True)

    async def _abandon(self, episode: AsyncEpisode) -> None:
        self.counts["abandoned"] += 1
        async with aclosing(episode.stream("Tell me a long story.")) as events:
            async for _ in events:
                break

    async def _act_when_free(self, episode: AsyncEpisode) -> None:
        """Acts, with retries: the abandoned act may still be in flight, or may have been committed."""
        while True:
            try:
                await self._act(episode)
                return
            except StepConflict:
                await episode.refresh()
            except ApiError as error:
                if error.code not in ("episode_busy", "idempotency_mismatch"):
                    raise
                await asyncio.sleep(0.05)
                await episode.refresh()

    async def _together(self) -> None:
        """Four episodes in batches, as a vector environment plays them."""
        episodes = [await self._open(action_space=_DISCRETE) for _ in range(4)]
        for _ in range(_NUM_STEPS):
            self.counts["acts"] += len(episodes)
            for result in await self._client.act_batch([(episode, "row 0, column 0", {}) for episode in episodes]):
                if isinstance(result, ApiError):
                    raise result
        for episode in episodes:
            await episode.end(truncated=True)

    async def _fork(self) -> None:
        """Four forks of one episode. The parent is deleted before the forks act."""
        parent = await self._open(action_space=_DISCRETE)
        for _ in range(_NUM_STEPS // 2):
            await self._act(parent)
        forks = await parent.fork(4, at_step=self._random.randint(1, _NUM_STEPS // 2))
        self.counts["episodes"] += len(forks)
        await parent.delete()
        for fork in forks:
            await self._act(fork)
            await fork.end()

    async def _leave(self) -> None:
        """An episode that its caller abandons, so that it ends by its idle timeout."""
        episode = await self._open(action_space=_DISCRETE, idle_ttl_s=_IDLE_TTL_S)
        await self._act(episode)

    async def _tidy(self) -> None:
        """Deletes all ended episodes but the newest ones."""
        while time.monotonic() < self._stop_at:
            await asyncio.sleep(_TIDY_S)
            try:
                ended = [episode.episode_id async for episode in self._client.episodes(status="ended")]
                await asyncio.gather(*map(self._delete, ended[NUM_KEPT:]))
            except EpisodicError as error:
                self.failures[f"tidy: {error}"[:200]] += 1

    async def _delete(self, episode_id: str) -> None:
        async with self._tidying:
            await self._client.run(calls.delete_episode(episode_id))
        self.counts["deleted"] += 1

    async def _export(self) -> None:
        while time.monotonic() < self._stop_at:
            await asyncio.sleep(_TIDY_S)
            try:
                async for _ in self._client.export("tokens", tag="soak"):
                    self.counts["exported"] += 1
            except EpisodicError as error:
                self.failures[f"export: {error}"[:200]] += 1
