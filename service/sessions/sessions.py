"""Operations on episodes: open, fork, act, end, delete.

A retry of a committed step is answered from the store. A retry of the act in flight joins it. Any other act is decided
by the agent and committed before it is answered.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from service.access.admission import Admission
from service.agent.agent import Agent
from service.agent.policies import Policies
from service.engine.base import ActionSpaceRefused, Engine, EngineUnavailable, Overflow, Recorded
from service.errors import Conflict, DeadlineExceeded, Unavailable, Unprocessable, episode_deleted
from service.filters import EpisodeFilter
from service.lifecycle import Lifecycle, Phase
from service.observability import metrics
from service.sessions.acts import ActRequest, ActResult, InFlightAct
from service.sessions.commits import Commits
from service.sessions.creation import Creation
from service.sessions.episode import Episode
from service.sessions.episode_cache import EpisodeCache
from service.sessions.expiry import Expiry
from service.sessions.retries import act_in_flight, busy, committed_step
from service.store.base import EpisodeGone, Store
from service.trajectory import Feedback, JsonValue, Message, Step, StopReason, StoredEpisode, public_id

Answer = dict[str, JsonValue]

_NONE: Mapping[str, JsonValue] = {}
_NO_TIME: dict[str, float] = dict.fromkeys(("queue_s", "engine_s", "store_s", "total_s"), 0.0)


class Sessions:
    """The episodes of one store. Acts need an engine: `serve` sets it."""

    def __init__(
        self,
        store: Store,
        *,
        max_cached_episodes: int,
        defaults: Mapping[str, JsonValue] = _NONE,
        admission: Admission | None = None,
        lifecycle: Lifecycle | None = None,
    ) -> None:
        """`defaults`: fields of POST /episode, for requests that leave them out."""
        self.store = store
        self.admission = admission or Admission()
        self.lifecycle = lifecycle or Lifecycle()
        self.expiry = Expiry(store, self.expire)
        self._agent: Agent | None = None
        self._cache = EpisodeCache(store, max_cached_episodes, lambda: self.agent.engine)
        self._creation = Creation(store, self._cache, self.admission, defaults, lambda: self.agent)
        self._commits = Commits(store, self._cache)

    def serve(self, engine: Engine, policies: Policies | None = None) -> None:
        """Sets the engine that decides all following acts."""
        self.admission.set_num_slots(engine.info.num_slots)
        self._agent = Agent(policies or Policies(engine, self.store), engine)
        self.lifecycle.engine_serves(lambda: engine.healthy)

    @property
    def agent(self) -> Agent:
        """The current agent. Raises EngineUnavailable while the first engine is loading."""
        if self._agent is None:
            raise EngineUnavailable("the model is still loading; retry later")
        return self._agent

    async def create(self, episode_id: str, request: dict[str, Any], digest: bytes) -> tuple[StoredEpisode, bool]:
        """Opens an episode; see `Creation.open`."""
        self._refuse_while_draining()
        stored, is_new = await self._creation.open(episode_id, request, digest)
        self.expiry.expect(stored.state.expires_at)
        return stored, is_new

    async def opened(self, episode_id: str, digest: bytes) -> StoredEpisode | None:
        """Returns the episode if the same request has already created it; otherwise None."""
        return await self._creation.opened(episode_id, digest)

    async def fork(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> tuple[list[StoredEpisode], bool]:
        """Forks an episode; see `Creation.fork`."""
        self._refuse_while_draining()
        stored, are_new = await self._creation.fork(parent_id, at_step, episode_ids, group, digest)
        self.expiry.expect(stored[0].state.expires_at)
        return stored, are_new

    async def get(self, episode_id: str) -> StoredEpisode:
        """Returns the episode without its steps. Raises NotFound, Gone."""
        return await self._cache.stored(episode_id)

    async def page(
        self, tenant: str, where: EpisodeFilter, *, limit: int, before: tuple[float, str] | None
    ) -> list[StoredEpisode]:
        """Returns one page of the tenant's episodes, newest first (keyset pagination).

        before: (created_at, episode_id) of the last episode of the previous page; None for the first page.
        """
        return await self.store.episodes(limit=limit, before=before, tenant=tenant, where=where)

    async def steps(self, episode_id: str) -> tuple[StoredEpisode, list[Step]]:
        """Returns the episode and its steps. Raises NotFound, Gone."""
        return await self._cache.trajectory(episode_id)

    async def add_feedback(self, feedback: Feedback) -> None:
        """Stores a rating. Raises NotFound, Gone, and Unprocessable for a step that does not exist."""
        stored = await self._cache.stored(feedback.episode_id)
        if feedback.step is not None and feedback.step >= stored.state.step:
            detail = f"there is no step {feedback.step}: the episode has {stored.state.step} steps"
            raise Unprocessable(detail, "step")
        try:
            await self.store.add_feedback(feedback)
        except EpisodeGone as error:
            raise episode_deleted(public_id(feedback.episode_id)) from error

    async def feedback(self, episode_id: str) -> list[Feedback]:
        """Returns the episode's ratings, oldest first."""
        return await self.store.feedback(episode_id)

    async def act(self, episode_id: str, request: ActRequest) -> Answer:
        """Performs an act. Returns the answer once the step is committed.

        Raises EpisodicError, EngineUnavailable, StoreUnavailable. No step was committed then, with one exception: after
        StoreUnavailable the result of the commit may be unknown. A retry then returns the step or repeats the act.
        """
        with _count_act():
            self._refuse_while_draining()
            episode = await self._cache.find(episode_id)
            try:
                return await self._answer(episode, request)
            except Conflict as conflict:
                if request.sink and request.sink.has_emitted:
                    raise
                episode = await self._reloaded(episode, conflict)
            return await self._answer(episode, request)

    async def record_action(self, episode_id: str, request: ActRequest) -> Answer:
        """Performs an act with an action that the caller chose; otherwise as `act`."""
        assert request.recorded is not None
        space, action = (await self._cache.find(episode_id)).options.action_space, request.recorded.value
        if space.unverified and isinstance(action, str):
            try:
                matches = await self.agent.engine.matches(space.unverified, action)
            except ActionSpaceRefused as error:
                raise Unprocessable(str(error), "action") from error
            if not matches:
                raise Unprocessable("the action must match the whole pattern of the action space", "action")
        return await self.act(episode_id, request)

    async def end(self, episode_id: str, request: ActRequest, stop_reason: StopReason) -> StoredEpisode:
        """Ends an episode. One that has ended is not changed. Raises NotFound, Gone, Conflict (episode_busy)."""
        episode = await self._cache.find(episode_id)
        try:
            await self._end(episode, request, stop_reason)
        except Conflict as conflict:
            await self._end(await self._reloaded(episode, conflict), request, stop_reason)
        return await self.get(episode_id)

    async def expire(self, episode_id: str) -> None:
        """Ends an episode if its idle timeout has expired.

        Raises Conflict (episode_busy) while an act is in flight, because its commit restarts the timeout.
        """
        episode = await self._cache.find(episode_id)
        try:
            await self._expire(episode)
        except Conflict as conflict:
            await self._expire(await self._reloaded(episode, conflict))

    async def delete(self, episode_id: str) -> None:
        """Deletes an episode. Raises NotFound, Gone, Conflict (episode_busy)."""
        episode = self._cache.peek(episode_id)
        if episode and episode.in_flight:
            raise busy()
        await self._cache.stored(episode_id)
        if not await self.store.delete(episode_id):
            raise episode_deleted(public_id(episode_id))
        self._cache.drop(episode_id)

    async def abort_acts(self) -> int:
        """Aborts the acts whose commit has not begun, and all later ones. Their callers receive 503 `draining`.

        Returns the number of acts in flight that were aborted.
        """
        self.lifecycle.enter(Phase.ABORTING)
        acts = [episode.in_flight for episode in self._cache]
        await asyncio.sleep(0)  # lets new tasks start: one that is cancelled before it starts cannot raise `draining`
        return sum(act.task.cancel() for act in acts if act and not act.is_committing)

    async def _reloaded(self, episode: Episode, conflict: Conflict) -> Episode:
        """Loads the episode again if it is stale, because another replica has committed steps. Otherwise raises the
        conflict."""
        is_stale = conflict.code == "step_conflict" or (
            conflict.code == "episode_busy" and await self._was_overtaken(episode)
        )
        if not is_stale:
            raise conflict
        if self._cache.peek(episode.episode_id) is episode and not episode.in_flight:
            self._cache.drop(episode.episode_id)
        return await self._cache.find(episode.episode_id)

    async def _was_overtaken(self, episode: Episode) -> bool:
        """Returns whether another replica has committed the step that is in flight here.

        If so, waits until the act in flight has ended.
        """
        stored = await self.store.episode(episode.episode_id)
        if stored is None or stored.state.step <= episode.state.step:
            return False
        if act := episode.in_flight:
            await asyncio.wait({act.task})
        return True

    async def _answer(self, episode: Episode, request: ActRequest) -> Answer:
        if step := await committed_step(self.store, episode, request):
            metrics.ACTS.labels("replayed").inc()
            own = {"episode_id": public_id(episode.episode_id)}  # a fork inherits steps that have its parent's id
            return {**step.answer, **own, "replayed": True, "timing": dict(_NO_TIME)}
        act, is_joined = self._act_for(episode, request)
        try:
            result = await act.join(request.timeout_s)
        except TimeoutError as error:
            if request.timeout_s is None:
                raise
            detail = f"The timeout of {request.timeout_s:g} s expired before the commit. Retry with a larger timeout_s."
            raise DeadlineExceeded("deadline_exceeded", detail) from error
        return {**result.step.answer, "replayed": is_joined or result.replayed, "timing": result.timing}

    def _act_for(self, episode: Episode, request: ActRequest) -> tuple[InFlightAct, bool]:
        """Returns the act in flight that the request repeats, or starts one; and whether the request joined it."""
        if act := act_in_flight(episode, request):
            return act, True
        episode.check_active()
        next_step = episode.state.step
        if request.step not in (None, next_step):
            detail = f"Step {request.step} is out of order: the next step is {next_step}."
            raise Conflict("step_conflict", detail, expected_step=next_step)
        recorded = episode.check_request(request)
        return episode.start(request, self._decide_and_commit(episode, request, recorded)), False

    async def _decide_and_commit(self, episode: Episode, request: ActRequest, recorded: Recorded | None) -> ActResult:
        slots = _Slots(self.admission, episode.config.tenant)
        try:
            if self.lifecycle.is_aborting:
                raise _draining()
            step, stop_reason = await self._next_step(episode, request, recorded, slots)
        except ActionSpaceRefused as error:  # the tokenizer has changed since the episode was opened
            raise Unprocessable(str(error), "action_space") from error
        except asyncio.CancelledError:
            if self.lifecycle.is_aborting:
                raise _draining() from None
            raise
        decided = time.perf_counter()
        committed = await self._commits.commit(episode, step, stop_reason)
        ended = time.perf_counter()
        timing = {
            "queue_s": slots.first_at - request.arrived,
            "engine_s": decided - slots.first_at,
            "store_s": ended - decided,
            "total_s": ended - request.arrived,
        }
        if committed is not step:
            metrics.ACTS.labels("replayed").inc()
            return ActResult(committed, timing, replayed=True)
        metrics.count_act(step, timing)
        return ActResult(step, timing)

    async def _next_step(
        self, episode: Episode, request: ActRequest, recorded: Recorded | None, slots: "_Slots"
    ) -> tuple[Step, StopReason | None]:
        """Returns the step for the request, which is not committed yet, and the stop reason if it ends the episode."""
        if stop_reason := episode.ends_with(request.message):
            return episode.closing_step(request), stop_reason
        decision = await self.agent.act(episode.view, request.message, slots.slot, recorded, request.sink)
        if isinstance(decision, Overflow):
            return episode.closing_step(request), episode.overflow()
        return episode.next_step(request, decision), None

    async def _expire(self, episode: Episode) -> None:
        expires_at = episode.state.expires_at
        if expires_at is None or expires_at > time.time():
            return
        if episode.in_flight:
            raise busy()
        await self._end(episode, ActRequest(Message(), digest=b"idle_ttl"), StopReason.IDLE_TTL)

    async def _end(self, episode: Episode, request: ActRequest, stop_reason: StopReason) -> None:
        act = episode.in_flight
        if act is None and episode.state.status == "active":
            act = episode.start(request, self._close(episode, request, stop_reason))
        elif act and act.request.digest != request.digest:
            raise busy()
        if act:
            await act.join(None)

    async def _close(self, episode: Episode, request: ActRequest, stop_reason: StopReason) -> ActResult:
        step = await self._commits.commit(episode, episode.closing_step(request), stop_reason)
        return ActResult(step, dict(_NO_TIME))

    def _refuse_while_draining(self) -> None:
        if self.lifecycle.is_draining:
            raise _draining()


@contextmanager
def _count_act() -> Generator[None]:
    """Counts the acts in flight, and the failed acts by error code."""
    with metrics.ACTIVE_ACTS.track_inprogress():
        try:
            yield
        except Exception as error:
            metrics.ACTS.labels(getattr(error, "code", "internal_error")).inc()
            raise


class _Slots:
    """The slots of one act in the engine.

    `first_at` is the `time.perf_counter()` at which the act got its first slot, or began if it needs none.
    """

    def __init__(self, admission: Admission, tenant: str) -> None:
        self._admission = admission
        self._tenant = tenant
        self._has_begun = False
        self.first_at = time.perf_counter()

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        async with self._admission.slot(self._tenant):
            if not self._has_begun:
                self._has_begun = True
                self.first_at = time.perf_counter()
            yield


def _draining() -> Unavailable:
    detail = "The service is shutting down. Retry after the number of seconds in Retry-After."
    return Unavailable("draining", detail, retry_after_s=5)
