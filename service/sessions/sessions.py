"""The calls of an episode, and the path of an act: retry, join or decide, then commit, then answer."""

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
    """Episodes over one store and, once `serve` was called, one engine."""

    def __init__(
        self,
        store: Store,
        *,
        max_cached_episodes: int,
        defaults: Mapping[str, JsonValue] = _NONE,
        admission: Admission | None = None,
        lifecycle: Lifecycle | None = None,
    ) -> None:
        """`defaults`: fields of POST /episode, for calls that name none."""
        self.store = store
        self.admission = admission or Admission()
        self.lifecycle = lifecycle or Lifecycle()
        self.expiry = Expiry(store, self.expire)
        self._agent: Agent | None = None
        self._cache = EpisodeCache(store, max_cached_episodes, lambda: self.agent.engine)
        self._creation = Creation(store, self._cache, self.admission, defaults, lambda: self.agent)
        self._commits = Commits(store, self._cache)

    def serve(self, engine: Engine, policies: Policies | None = None) -> None:
        """From now on this engine decides."""
        self.admission.set_num_slots(engine.info.num_slots)
        self._agent = Agent(policies or Policies(engine, self.store), engine)
        self.lifecycle.engine_serves(lambda: engine.healthy)

    @property
    def agent(self) -> Agent:
        """Raises EngineUnavailable while the first engine is loading."""
        if self._agent is None:
            raise EngineUnavailable("the policy is still loading")
        return self._agent

    async def create(self, episode_id: str, request: dict[str, Any], digest: bytes) -> tuple[StoredEpisode, bool]:
        """Opens an episode; returns it and whether it is new. Raises Unprocessable, Conflict, Gone, TooManyRequests."""
        self._refuse_while_draining()
        stored, is_new = await self._creation.open(episode_id, request, digest)
        self.expiry.expect(stored.state.expires_at)
        return stored, is_new

    async def opened(self, episode_id: str, digest: bytes) -> StoredEpisode | None:
        """The episode, if the same request opened it earlier."""
        return await self._creation.opened(episode_id, digest)

    async def fork(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> tuple[list[StoredEpisode], bool]:
        """As `Creation.fork`."""
        self._refuse_while_draining()
        stored, are_new = await self._creation.fork(parent_id, at_step, episode_ids, group, digest)
        self.expiry.expect(stored[0].state.expires_at)
        return stored, are_new

    async def get(self, episode_id: str) -> StoredEpisode:
        """Raises NotFound, Gone."""
        return await self._cache.stored(episode_id)

    async def page(
        self, tenant: str, where: EpisodeFilter, *, limit: int, before: tuple[float, str] | None
    ) -> list[StoredEpisode]:
        """The tenant's episodes, newest first, created before `before` = (created_at, episode_id)."""
        return await self.store.episodes(limit=limit, before=before, tenant=tenant, where=where)

    async def steps(self, episode_id: str) -> tuple[StoredEpisode, list[Step]]:
        """The episode and its steps. Raises NotFound, Gone."""
        return await self._cache.trajectory(episode_id)

    async def add_feedback(self, feedback: Feedback) -> None:
        """Raises NotFound, Gone, and Unprocessable for a step that does not exist."""
        stored = await self._cache.stored(feedback.episode_id)
        if feedback.step is not None and feedback.step >= stored.state.step:
            raise Unprocessable(f"the episode has {stored.state.step} steps", "step")
        try:
            await self.store.add_feedback(feedback)
        except EpisodeGone as error:
            raise episode_deleted(public_id(feedback.episode_id)) from error

    async def feedback(self, episode_id: str) -> list[Feedback]:
        """The episode's ratings, oldest first."""
        return await self.store.feedback(episode_id)

    async def act(self, episode_id: str, request: ActRequest) -> Answer:
        """The step's action, once it is committed. Raises EpisodicError, EngineUnavailable, StoreUnavailable.

        If it raises, nothing was committed, unless the result of the commit is unknown: then a retry finds out.
        """
        with _counted():
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
        """As `act`, with an action that somebody else chose."""
        assert request.recorded is not None
        space, action = (await self._cache.find(episode_id)).options.action_space, request.recorded.value
        if space.unverified and isinstance(action, str):
            try:
                matches = await self.agent.engine.matches(space.unverified, action)
            except ActionSpaceRefused as error:
                raise Unprocessable(str(error), "action") from error
            if not matches:
                raise Unprocessable("the pattern does not match the action in full", "action")
        return await self.act(episode_id, request)

    async def end(self, episode_id: str, request: ActRequest, stop_reason: StopReason) -> StoredEpisode:
        """Ends an episode; an ended one stays as it is. Raises NotFound, Gone, Conflict (episode_busy)."""
        episode = await self._cache.find(episode_id)
        try:
            await self._end(episode, request, stop_reason)
        except Conflict as conflict:
            await self._end(await self._reloaded(episode, conflict), request, stop_reason)
        return await self.get(episode_id)

    async def expire(self, episode_id: str) -> None:
        """Ends an episode whose idle timeout has passed. Raises Conflict (episode_busy) while an act is in flight: its
        commit starts the timeout again."""
        episode = await self._cache.find(episode_id)
        try:
            await self._expire(episode)
        except Conflict as conflict:
            await self._expire(await self._reloaded(episode, conflict))

    async def delete(self, episode_id: str) -> None:
        """Raises NotFound, Gone, Conflict (episode_busy)."""
        episode = self._cache.peek(episode_id)
        if episode and episode.in_flight:
            raise busy()
        await self._cache.stored(episode_id)
        if not await self.store.delete(episode_id):
            raise episode_deleted(public_id(episode_id))
        self._cache.drop(episode_id)

    async def abort_acts(self) -> int:
        """Aborts the acts whose commit has not begun, and those that come later: their callers get 503 `draining`.
        Returns the number that were in flight."""
        self.lifecycle.enter(Phase.ABORTING)
        acts = [episode.in_flight for episode in self._cache]
        await asyncio.sleep(0)  # a task that has not started yet could not say why it ends
        return sum(act.task.cancel() for act in acts if act and not act.is_committing)

    async def _reloaded(self, episode: Episode, conflict: Conflict) -> Episode:
        """The episode as the store has it, if the conflict arose because another replica took it further. Otherwise
        raises the conflict."""
        is_stale = conflict.code == "step_conflict" or (
            conflict.code == "episode_busy" and await self._was_overtaken(episode)
        )
        if not is_stale:
            raise conflict
        if self._cache.peek(episode.episode_id) is episode and not episode.in_flight:
            self._cache.drop(episode.episode_id)
        return await self._cache.find(episode.episode_id)

    async def _was_overtaken(self, episode: Episode) -> bool:
        """Whether another replica took the step that is in flight here. If so, returns once the act has ended."""
        stored = await self.store.episode(episode.episode_id)
        if stored is None or stored.state.step <= episode.state.step:
            return False
        if act := episode.in_flight:
            await asyncio.wait({act.task})
        return True

    async def _answer(self, episode: Episode, request: ActRequest) -> Answer:
        if step := await committed_step(self.store, episode, request):
            metrics.ACTS.labels("replayed").inc()
            own = {"episode_id": public_id(episode.episode_id)}  # a fork's early steps are its parent's
            return {**step.answer, **own, "replayed": True, "timing": dict(_NO_TIME)}
        act, is_joined = self._act_for(episode, request)
        try:
            result = await act.join(request.timeout_s)
        except TimeoutError as error:
            if request.timeout_s is None:
                raise
            raise DeadlineExceeded("deadline_exceeded", f"{request.timeout_s:g} s ran out.") from error
        return {**result.step.answer, "replayed": is_joined or result.replayed, "timing": result.timing}

    def _act_for(self, episode: Episode, request: ActRequest) -> tuple[InFlightAct, bool]:
        """The act in flight that the request repeats, or a new one; and whether it was joined."""
        if act := act_in_flight(episode, request):
            return act, True
        episode.check_active()
        next_step = episode.state.step
        if request.step not in (None, next_step):
            detail = f"The next step is {next_step}, not {request.step}."
            raise Conflict("step_conflict", detail, expected_step=next_step)
        recorded = episode.check_request(request)
        return episode.start(request, self._decide_and_commit(episode, request, recorded)), False

    async def _decide_and_commit(self, episode: Episode, request: ActRequest, recorded: Recorded | None) -> ActResult:
        slots = _Slots(self.admission, episode.config.tenant)
        try:
            if self.lifecycle.is_aborting:
                raise _draining()
            step, stop_reason = await self._next_step(episode, request, recorded, slots)
        except ActionSpaceRefused as error:  # the policy's tokenizer is not the one that the episode was opened with
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
        """The step that answers the request, not committed yet, and why the episode ends with it, if it does."""
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
def _counted() -> Generator[None]:
    """Counts an act while it is in flight, and one that fails by the code of its error."""
    with metrics.ACTIVE_ACTS.track_inprogress():
        try:
            yield
        except Exception as error:
            metrics.ACTS.labels(getattr(error, "code", "internal_error")).inc()
            raise


class _Slots:
    """An act's slots in the engine. `first_at`: when it got the first one; if it needs none, when it began."""

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
    return Unavailable("draining", "The service is shutting down.", retry_after_s=5)
