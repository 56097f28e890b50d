"""Creates episodes: opens or forks them within the tenant's quota, and recognizes retries."""

import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from service.access.admission import Admission
from service.agent.agent import Agent
from service.agent.loaded_adapters import Policy
from service.agent.options import Options, checked, restored
from service.agent.policy_names import PolicyUnknown
from service.engine.base import ActionSpaceRefused, EngineUnavailable, uncancelled
from service.errors import Conflict, Gone, TooManyRequests, Unprocessable, episode_deleted
from service.observability import metrics
from service.sessions.episode import Episode
from service.sessions.episode_cache import EpisodeCache
from service.store.base import EpisodeExists, EpisodeGone, Store
from service.trajectory import EpisodeConfig, EpisodeState, JsonValue, StoredEpisode, public_id


class Creation:
    """Creates episodes in the store, and adds them to the cache."""

    def __init__(
        self,
        store: Store,
        cache: EpisodeCache,
        admission: Admission,
        defaults: Mapping[str, JsonValue],
        agent: Callable[[], Agent],
    ) -> None:
        """`defaults`: fields of POST /episode, for requests that leave them out. `agent`: returns the current agent; it
        raises EngineUnavailable while there is none."""
        self._store = store
        self._cache = cache
        self._admission = admission
        self._defaults = defaults
        self._agent = agent
        self._num_opening: Counter[str] = Counter()

    async def open(self, episode_id: str, request: dict[str, Any], digest: bytes) -> tuple[StoredEpisode, bool]:
        """Opens an episode. Returns it, and whether it is new.

        Raises Unprocessable, Conflict, Gone, TooManyRequests, EngineUnavailable, StoreUnavailable.
        """
        now, agent = round(time.time(), 6), self._agent()  # in microseconds, as ISO 8601 times of clients
        info = agent.engine.info
        if info.no_episodes:
            detail = f"the model {info.model!r} serves /v1 but no episodes: {info.no_episodes}"
            raise Unprocessable(detail, "policy")
        name, policy = await _policy(agent, request)
        unnamed = {field: value for field, value in self._defaults.items() if request.get(field) is None}
        request = {**request, **unnamed, "policy": name}
        options = await _checked(agent, request)
        is_pinned = "@" in name or request.get("policy_updates") != "follow"
        pin = policy.digest if is_pinned else None
        config = EpisodeConfig(episode_id, request, digest, policy.version, now, policy_digest=pin)
        state = EpisodeState(num_parse_failures=0, num_recorded=0, updated_at=now, expires_at=options.expires_at(now))
        stored = StoredEpisode(config, state)
        try:
            async with self._within_quota(config.tenant):
                await self._store.create(stored)
        except EpisodeExists:
            known = await self._cache.stored(episode_id)
            if known.config.digest != digest:
                detail = f"Episode {public_id(episode_id)!r} exists with a different body. Use another episode_id."
                raise Conflict("idempotency_mismatch", detail) from None
            return known, False
        except TooManyRequests:
            if known := await self.opened(episode_id, digest):
                return known, False
            raise
        self._add_to_cache([Episode(stored, options, agent.engine.history())])
        return stored, True

    async def opened(self, episode_id: str, digest: bytes) -> StoredEpisode | None:
        """Returns the episode if the same request has already created it; otherwise None."""
        known = await self._store.episode(episode_id)
        return known if known and not known.deleted and known.config.digest == digest else None

    async def fork(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> tuple[list[StoredEpisode], bool]:
        """Forks an episode, once for each of `episode_ids`.

        at_step: the forks share the parent's steps before this one; None for all steps.
        group: group of the forks. Default: the parent's group, or its id if it has none.

        If the parent has a seed, the first fork keeps it, so that it draws as the parent would. Each other fork gets a
        new seed. Returns the forks, and whether they are new.

        Raises NotFound, Gone, Unprocessable, Conflict, TooManyRequests, EngineUnavailable, StoreUnavailable.
        """
        digest = hashlib.blake2b(digest + parent_id.encode(), digest_size=16).digest()
        try:
            forks = await self._create_forks(parent_id, at_step, episode_ids, group, digest)
        except (EpisodeExists, Gone, TooManyRequests) as error:
            records = [await self._store.episode(episode_id) for episode_id in episode_ids]
            known = [record for record in records if record and not record.deleted and record.config.digest == digest]
            if len(known) == len(records):
                return known, False
            if not isinstance(error, EpisodeExists):
                raise
            for record in records:
                if record and record.deleted:
                    raise episode_deleted(public_id(record.config.episode_id)) from error
            detail = "One of these episodes already exists. Use other episode_ids."
            raise Conflict("idempotency_mismatch", detail) from error
        self._add_to_cache(forks)
        return [StoredEpisode(fork.config, fork.state) for fork in forks], True

    async def _create_forks(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> list[Episode]:
        engine = self._agent().engine
        stored, rows = await self._cache.trajectory(parent_id)
        rows = [row for row in rows if not row.closing]
        step = len(rows) if at_step is None else at_step
        if step > len(rows):
            raise Unprocessable(f"at_step must be at most {len(rows)}, the episode's number of steps", "at_step")
        cached = self._cache.peek(parent_id)
        is_same = cached and cached.config.created_at == stored.config.created_at
        options = cached.options if cached and is_same else await restored(stored.config.request, engine.info)
        parent = Episode(stored, options, engine.history())
        shared_group: str = group or stored.config.request.get("group") or public_id(parent_id)
        forks = parent.forks(rows[:step], episode_ids, shared_group, digest, engine.history())
        try:
            async with self._within_quota(stored.config.tenant, len(forks)):
                await self._store.fork([StoredEpisode(fork.config, fork.state) for fork in forks])
        except EpisodeGone as error:
            raise episode_deleted(public_id(parent_id)) from error
        return forks

    @asynccontextmanager
    async def _within_quota(self, tenant: str, num_new: int = 1) -> AsyncGenerator[None]:
        """Checks the tenant's quota for `num_new` more active episodes, which must be created inside the context.

        Episodes that this replica is creating at the same time count. Those that other replicas are creating do not, so
        several replicas together can exceed the quota. Raises TooManyRequests (quota_exceeded).
        """
        allowed = self._admission.quota(tenant).active_episodes
        if allowed is None:
            yield
            return
        self._num_opening[tenant] += num_new
        try:
            num_active = await self._store.num_active(tenant)
            if num_active + self._num_opening[tenant] > allowed:
                detail = f"The quota of {allowed} active episodes is exceeded. End other episodes first."
                raise TooManyRequests("quota_exceeded", detail, retry_after_s=1)
            yield
        finally:
            self._num_opening[tenant] -= num_new

    def _add_to_cache(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            self._cache.keep(episode)
        metrics.EPISODES_STARTED.inc(len(episodes))


async def _policy(agent: Agent, request: dict[str, Any]) -> tuple[str, Policy]:
    """Returns the policy of a new episode, and the name to store. Raises Unprocessable, EngineUnavailable."""
    asked = request.get("policy")
    name: str = asked or agent.policies.default
    try:
        policy = await agent.policies.get(name)
    except PolicyUnknown as error:
        if asked:
            raise Unprocessable(str(error), "policy") from error
        raise EngineUnavailable(f"the default policy is not served: {error}") from error
    if policy.adapter is None:
        return policy.name, policy
    if asked and "@" in asked and request.get("policy_updates") == "follow":
        detail = (
            f"a version never changes, so no episode can follow {asked[:200]!r}. Name the policy without @ and digest."
        )
        raise Unprocessable(detail, "policy_updates")
    return name, policy


async def _checked(agent: Agent, request: dict[str, Any]) -> Options:
    """Builds the options, and checks the action space completely, so that no act can fail because of it."""
    try:
        options = await checked(request, agent.engine.info)
        with uncancelled():
            await agent.engine.check(options.action_space)
    except ActionSpaceRefused as error:
        raise Unprocessable(str(error), "action_space") from error
    return options
