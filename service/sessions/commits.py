"""Commits steps to the store. Resolves races with other replicas, and commits whose result is unknown."""

from service.errors import Conflict
from service.observability import metrics
from service.sessions.acts import ActRequest
from service.sessions.episode import Episode, check_active, closing_step, ended_state
from service.sessions.episode_cache import EpisodeCache
from service.store.base import Commit, StepTaken, Store, StoreUnavailable
from service.trajectory import EpisodeConfig, EpisodeState, Step, StopReason, StoredEpisode


class Commits:
    """Commits steps. No other class writes them to the store."""

    def __init__(self, store: Store, cache: EpisodeCache) -> None:
        self._store = store
        self._cache = cache

    async def commit(self, episode: Episode, step: Step, stop_reason: StopReason | None) -> Step:
        """Commits a step. If `stop_reason` is set, the episode ends with this step.

        Returns the committed step: `step`, or the step that another replica committed first for the same request.
        Raises Conflict (step_conflict, episode_ended) if another request took the step, Gone, Unprocessable,
        StoreUnavailable.
        """
        state = episode.state_after(step, stop_reason)
        act = episode.in_flight
        if act:
            act.is_committing = True
        try:
            await self._store.commit(Commit(step, state, episode.config.created_at))
            episode.advance(step, state)
        except StepTaken:
            self._cache.drop(episode.episode_id)
            return await self._winner(step, names_step=step.closing or bool(act and act.request.step is not None))
        except StoreUnavailable:
            self._cache.drop(episode.episode_id)
            if not await self._is_stored(step):
                raise
        except BaseException:
            self._cache.drop(episode.episode_id)  # the result is unknown: the next call must read the store
            raise
        _count_end(episode.config, state)
        return step

    async def end(self, stored: StoredEpisode, request: ActRequest, stop_reason: StopReason) -> StoredEpisode | None:
        """Ends an episode, without its steps in memory.

        Returns None if another call committed a step or ended the episode meanwhile. Raises Unprocessable,
        StoreUnavailable.
        """
        step = closing_step(stored.config, stored.state, request)
        state = ended_state(stored.state, step, stop_reason)
        try:
            await self._store.commit(Commit(step, state, stored.config.created_at))
        except StepTaken:
            return None
        except StoreUnavailable:
            if not await self._is_stored(step):
                raise
        finally:
            self._cache.drop_idle(step.episode_id)
        _count_end(stored.config, state)
        return StoredEpisode(stored.config, state)

    async def _is_stored(self, step: Step) -> bool:
        """Re-reads a step to find out whether a commit with an unknown result was stored. Raises StoreUnavailable."""
        rows = await self._store.steps(step.episode_id, step.index)
        return bool(rows) and (rows[0].digest, rows[0].created_at) == (step.digest, step.created_at)

    async def _winner(self, step: Step, *, names_step: bool) -> Step:
        """Returns the stored step with the same index if it answers the same request.

        Otherwise raises Conflict: episode_ended if the episode has ended meanwhile, else step_conflict.

        An equal body alone does not identify a retry: the request must name its step or have the same idempotency key.
        Raises Gone for a deleted episode, whose steps remain if forks need them.
        """
        state = (await self._cache.stored(step.episode_id)).state
        for row in await self._store.steps(step.episode_id, step.index):
            has_key = step.idempotency_key is not None and step.idempotency_key == row.idempotency_key
            if row.digest == step.digest and (names_step or has_key):
                return row
        check_active(state)
        detail = f"Another act was committed as step {step.index}. The next step is {state.step}."
        raise Conflict("step_conflict", detail, expected_step=state.step)


def _count_end(config: EpisodeConfig, state: EpisodeState) -> None:
    if state.stop_reason:
        metrics.count_end(state.stop_reason, config.request.get("profile"), state.episode_return, state.step)
