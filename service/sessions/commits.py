"""Commits: how a step becomes durable, who wins a race with another replica, and what an unknown result means."""

from service.errors import Conflict
from service.observability import metrics
from service.sessions.episode import Episode
from service.sessions.episode_cache import EpisodeCache
from service.store.base import Commit, StepTaken, Store, StoreUnavailable
from service.trajectory import Step, StopReason


class Commits:
    """The only place where steps of cached episodes are written to the store."""

    def __init__(self, store: Store, cache: EpisodeCache) -> None:
        self._store = store
        self._cache = cache

    async def commit(self, episode: Episode, step: Step, stop_reason: StopReason | None) -> Step:
        """The committed step: this one, which the episode then takes over, or one that another replica committed first
        for a retry of the same request. Raises Conflict (step_conflict), StoreUnavailable.
        """
        state = episode.state_after(step, stop_reason)
        act = episode.in_flight
        if act:
            act.is_committing = True
        try:
            await self._store.commit(Commit(step, state))
            episode.advance(step, state)
        except StepTaken:
            self._cache.drop(episode.episode_id)
            return await self._winner(step, names_step=step.closing or bool(act and act.request.step is not None))
        except StoreUnavailable:
            self._cache.drop(episode.episode_id)
            if not await self._is_kept(step):
                raise
        except BaseException:
            self._cache.drop(episode.episode_id)  # the result is unknown: the next call reads the store
            raise
        if stop_reason:
            metrics.count_end(stop_reason, episode.config.request.get("profile"), state.episode_return, state.step)
        return step

    async def _is_kept(self, step: Step) -> bool:
        """Whether a commit with an unknown result took place: re-reads the step. Raises StoreUnavailable."""
        rows = await self._store.steps(step.episode_id, step.index)
        return bool(rows) and (rows[0].digest, rows[0].created_at) == (step.digest, step.created_at)

    async def _winner(self, step: Step, *, names_step: bool) -> Step:
        """The stored step with this index, if it answers the same request. An equal body alone does not prove that."""
        for row in await self._store.steps(step.episode_id, step.index):
            has_key = step.idempotency_key is not None and step.idempotency_key == row.idempotency_key
            if row.digest == step.digest and (names_step or has_key):
                return row
        state = (await self._cache.stored(step.episode_id)).state
        detail = f"Another act took step {step.index}; the next is {state.step}."
        raise Conflict("step_conflict", detail, expected_step=state.step)
