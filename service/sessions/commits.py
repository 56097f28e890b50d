"""Owns how a step becomes durable: its commit, the race for it with another replica, an outcome that was lost."""

from service.errors import Conflict
from service.observability import metrics
from service.sessions.episode import Episode
from service.sessions.episode_cache import LiveEpisodes
from service.store.base import Commit, StepTaken, Store, StoreUnavailable
from service.trajectory import Step, StopReason


class Commits:
    """Steps of live episodes go into the store here, and nowhere else."""

    def __init__(self, store: Store, live: LiveEpisodes) -> None:
        self._store = store
        self._live = live

    async def commit(self, episode: Episode, step: Step, stop_reason: StopReason | None) -> Step:
        """The committed step: this one, which the live episode has taken over, or one that another replica committed
        first for a retry of the same call. Raises Conflict (step_conflict), StoreUnavailable.
        """
        head = episode.head_after(step, stop_reason)
        flight = episode.flight
        if flight:
            flight.committing = True
        try:
            await self._store.commit(Commit(step, head))
            episode.record(step, head)
        except StepTaken:
            self._live.drop(episode.episode_id)
            return await self._winner(step, names_step=step.closing or bool(flight and flight.call.step is not None))
        except StoreUnavailable:
            self._live.drop(episode.episode_id)
            if not await self._is_kept(step):
                raise
        except BaseException:
            self._live.drop(episode.episode_id)  # the outcome is unknown: the next touch asks the store
            raise
        if stop_reason:
            metrics.record_end(stop_reason, episode.config.request.get("profile"), head.episode_return, head.step)
        return step

    async def _is_kept(self, step: Step) -> bool:
        """Whether a commit whose answer was lost took place. Raises StoreUnavailable if that cannot be told now."""
        rows = await self._store.steps(step.episode_id, step.index)
        return bool(rows) and (rows[0].digest, rows[0].created_at) == (step.digest, step.created_at)

    async def _winner(self, step: Step, *, names_step: bool) -> Step:
        """The step that is there in place of this one, if it answers the same call: equal words alone are no proof."""
        for row in await self._store.steps(step.episode_id, step.index):
            has_key = step.idempotency_key is not None and step.idempotency_key == row.idempotency_key
            if row.digest == step.digest and (names_step or has_key):
                return row
        head = (await self._live.record(step.episode_id)).head
        detail = f"Another act took step {step.index}; the next is {head.step}."
        raise Conflict("step_conflict", detail, expected_step=head.step)
