"""Creation of episodes: opened or forked, within their tenant's quota, and only once if a request is repeated."""

import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from service.access.admission import Admission
from service.agent.agent import Agent
from service.agent.options import Options, checked
from service.engine.base import ActionSpaceRefused
from service.errors import Conflict, Gone, TooManyRequests, Unprocessable, episode_deleted
from service.observability import metrics
from service.sessions.episode import Episode
from service.sessions.episode_cache import EpisodeCache
from service.store.base import EpisodeExists, EpisodeGone, Store
from service.trajectory import EpisodeConfig, EpisodeState, JsonValue, StoredEpisode, public_id


class Creation:
    """Opens episodes in the store, and puts them into the cache."""

    def __init__(
        self,
        store: Store,
        cache: EpisodeCache,
        admission: Admission,
        defaults: Mapping[str, JsonValue],
        agent: Callable[[], Agent],
    ) -> None:
        """`defaults`: fields of POST /episode, for calls that name none. `agent`: the current one; raises
        EngineUnavailable while there is none."""
        self._store = store
        self._cache = cache
        self._admission = admission
        self._defaults = defaults
        self._agent = agent
        self._num_opening: Counter[str] = Counter()

    async def open(self, episode_id: str, request: dict[str, Any], digest: bytes) -> tuple[StoredEpisode, bool]:
        """The episode, and whether it is new. Raises Unprocessable, Conflict, Gone, TooManyRequests."""
        now, agent = time.time(), self._agent()
        info = agent.engine.info
        if not info.generates:
            raise Unprocessable(f"{info.model!r} does not generate: it serves /v1 and no episodes", "policy")
        name = request.get("policy") or info.model
        if name not in agent.policies:
            raise Unprocessable(f"the policy {name[:200]!r} is not served (GET /policy)", "policy")
        unnamed = {field: value for field, value in self._defaults.items() if request.get(field) is None}
        request = {**request, **unnamed, "policy": name}
        options = await _checked(agent, request)
        config = EpisodeConfig(episode_id, request, digest, agent.policies.get(name).version, now)
        stored = StoredEpisode(config, EpisodeState(updated_at=now, expires_at=options.expires_at(now)))
        try:
            async with self._room(config.tenant):
                await self._store.create(stored)
        except EpisodeExists:
            known = await self._cache.stored(episode_id)
            if known.config.digest != digest:
                raise Conflict(
                    "idempotency_mismatch", f"Episode {public_id(episode_id)!r} exists with another body."
                ) from None
            return known, False
        except TooManyRequests:
            if known := await self.opened(episode_id, digest):
                return known, False
            raise
        self._began([Episode(stored, options, agent.engine.history())])
        return stored, True

    async def opened(self, episode_id: str, digest: bytes) -> StoredEpisode | None:
        """The episode, if it was opened by the same call before."""
        known = await self._store.episode(episode_id)
        return known if known and not known.deleted and known.config.digest == digest else None

    async def fork(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> tuple[list[StoredEpisode], bool]:
        """Episodes that go on from the parent as it was before `at_step` (now, if None), and whether they are new. They
        are of one group: `group`, or the parent's, or else its id. With a seed the first draws as the parent would,
        each other from a seed of its own. Raises NotFound, Gone, Unprocessable, Conflict, TooManyRequests.
        """
        digest = hashlib.blake2b(digest + parent_id.encode(), digest_size=16).digest()
        try:
            forks = await self._forked(parent_id, at_step, episode_ids, group, digest)
        except (EpisodeExists, Gone, TooManyRequests) as error:
            known = [await self.opened(episode_id, digest) for episode_id in episode_ids]
            if all(known):
                return [stored for stored in known if stored], False
            if not isinstance(error, EpisodeExists):
                raise
            raise Conflict("idempotency_mismatch", "One of these episodes exists already.") from error
        self._began(forks)
        return [StoredEpisode(fork.config, fork.state) for fork in forks], True

    async def _forked(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> list[Episode]:
        parent = await self._cache.find(parent_id)
        rows = [row for row in await self._store.steps(parent_id) if not row.closing]
        step = len(rows) if at_step is None else at_step
        if step > len(rows):
            raise Unprocessable(f"the episode has {len(rows)} steps", "at_step")
        shared_group: str = group or parent.config.request.get("group") or public_id(parent_id)
        history = self._agent().engine.history()
        forks = parent.forks(rows[:step], episode_ids, shared_group, digest, history)
        try:
            async with self._room(parent.config.tenant, len(forks)):
                await self._store.fork([StoredEpisode(fork.config, fork.state) for fork in forks])
        except EpisodeGone as error:
            raise episode_deleted(public_id(parent_id)) from error
        return forks

    @asynccontextmanager
    async def _room(self, tenant: str, num_new: int = 1) -> AsyncGenerator[None]:
        """Room for more active episodes of the tenant's. Raises TooManyRequests (quota_exceeded). Those that are being
        opened here count; with several replicas, those that another opens at this moment do not."""
        allowed = self._admission.quota(tenant).active_episodes
        if allowed is None:
            yield
            return
        self._num_opening[tenant] += num_new
        try:
            num_active = await self._store.num_active(tenant)
            if num_active + self._num_opening[tenant] > allowed:
                detail = f"More than {allowed} active episodes; end some."
                raise TooManyRequests("quota_exceeded", detail, retry_after_s=1)
            yield
        finally:
            self._num_opening[tenant] -= num_new

    def _began(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            self._cache.keep(episode)
        metrics.EPISODES_STARTED.inc(len(episodes))


async def _checked(agent: Agent, request: dict[str, Any]) -> Options:
    """Everything that could fail at an act because of the action space fails here instead."""
    try:
        options = await checked(request, agent.engine.info)
        await agent.engine.check(options.action_space)
    except ActionSpaceRefused as error:
        raise Unprocessable(str(error), "action_space") from error
    return options
