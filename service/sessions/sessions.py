"""Owns the calls of an episode: which are new, which repeat or join another, which are out of turn; and their way."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from service.access.admission import Admission
from service.agent.action_spaces import ActionSpaceError, RegexSpace
from service.agent.agent import Agent
from service.agent.policies import Policies
from service.engine.base import ConstraintRefused, Engine, EngineUnavailable
from service.engine.prompt import Prompt, TemplateReport
from service.errors import (
    Conflict,
    DeadlineExceeded,
    EpisodicError,
    Unavailable,
    Unprocessable,
    episode_deleted,
)
from service.observability import metrics
from service.sessions.commits import Commits
from service.sessions.creation import Opening
from service.sessions.episode import Call, Episode, Flight, Landing, Listener
from service.sessions.episode_cache import LiveEpisodes
from service.sessions.expiry import Sweeper
from service.store.base import EpisodeGone, Filter, Store, StoreUnavailable
from service.trajectory import (
    EpisodeRecord,
    Feedback,
    JsonValue,
    Message,
    Step,
    StopReason,
    public_id,
)

T = TypeVar("T")
Answer = dict[str, JsonValue]

_NONE: Mapping[str, JsonValue] = {}
_NO_TIME: dict[str, float] = dict.fromkeys(("queue_s", "engine_s", "store_s", "total_s"), 0.0)


class Sessions:
    """Episodes over one store and, once `serve` was called, one engine."""

    def __init__(
        self,
        store: Store,
        *,
        max_live_episodes: int,
        defaults: Mapping[str, JsonValue] = _NONE,
        admission: Admission | None = None,
    ) -> None:
        """`defaults`: fields of POST /episode where a call names none."""
        self.store = store
        self.admission = admission or Admission()
        self.sweeper = Sweeper(store, self.expire)
        self.leaving = False
        """A signal came: what routes to it is to look for another replica; acts are served until it drains."""
        self.draining = False
        self._aborts = False
        self._agent: Agent | None = None
        self._live = LiveEpisodes(store, max_live_episodes, lambda: self.agent.engine.info)
        self._opening = Opening(store, self._live, self.admission, defaults)
        self._commits = Commits(store, self._live)

    def serve(self, engine: Engine, policies: Policies | None = None) -> TemplateReport:
        """Acts are possible from now on. Raises TemplateError for a chat template that cannot carry an episode."""
        prompt = Prompt(engine.tokenizer, engine.info.think_tags)
        self.admission.serve(engine.info.max_num_seqs)
        self._agent = Agent(policies or Policies(engine, self.store), engine, prompt)
        return prompt.report

    @property
    def agent(self) -> Agent:
        if self._agent is None:
            raise EngineUnavailable("the policy is still loading")
        return self._agent

    @property
    def unready_reason(self) -> str | None:
        """Why an act would not be served now: draining, loading, engine_unavailable; None if it would."""
        if self.draining:
            return "draining"
        if self._agent is None:
            return "loading"
        return None if self._agent.engine.healthy else "engine_unavailable"

    async def create(self, episode_id: str, request: dict[str, Any], digest: bytes) -> tuple[EpisodeRecord, bool]:
        """Opens an episode; returns it and whether it is new. Raises Unprocessable, Conflict, Gone, TooManyRequests."""
        self._refuse_while_draining()
        record, is_new = await self._opening.open(self.agent, episode_id, request, digest)
        self.sweeper.expect(record.head.expires_at)
        return record, is_new

    async def opened(self, episode_id: str, digest: bytes) -> EpisodeRecord | None:
        """The episode, if it was opened by the same call before."""
        return await self._opening.opened(episode_id, digest)

    async def fork(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> tuple[list[EpisodeRecord], bool]:
        """As `Opening.fork`."""
        self._refuse_while_draining()
        records, are_new = await self._opening.fork(parent_id, at_step, episode_ids, group, digest)
        self.sweeper.expect(records[0].head.expires_at)
        return records, are_new

    async def get(self, episode_id: str) -> EpisodeRecord:
        """Raises NotFound, Gone."""
        return await self._live.record(episode_id)

    async def record(self, episode_id: str, call: Call) -> Answer:
        """As `act`, with the action that somebody else chose."""
        assert call.recorded is not None
        space, action = (await self._live.find(episode_id)).options.action_space, call.recorded.action
        if isinstance(space, RegexSpace) and isinstance(action, str):
            try:
                matches = await self.agent.engine.matches(space.constraint, action)
            except ConstraintRefused as error:
                raise Unprocessable(str(error), "action") from error
            if not matches:
                raise Unprocessable("the pattern does not match the action in full", "action")
        return await self.act(episode_id, call)

    async def add_feedback(self, feedback: Feedback) -> None:
        """Raises NotFound, Gone, Unprocessable for a step that is not there."""
        record = await self._live.record(feedback.episode_id)
        if feedback.step is not None and feedback.step >= record.head.step:
            raise Unprocessable(f"the episode has {record.head.step} steps", "step")
        try:
            await self.store.add_feedback(feedback)
        except EpisodeGone as error:
            raise episode_deleted(public_id(feedback.episode_id)) from error

    async def feedback(self, episode_id: str) -> list[Feedback]:
        """What people said of it, oldest first."""
        return await self.store.feedback(episode_id)

    async def expire(self, episode_id: str) -> None:
        """Ends an episode whose idle time is over. Raises Conflict (episode_busy) while an act is in flight: its commit
        will give it the whole time again."""
        await self._twice(episode_id, self._expire)

    async def _expire(self, episode: Episode) -> None:
        expires_at = episode.head.expires_at
        if expires_at is None or expires_at > time.time():
            return
        if episode.flight:
            raise _busy()
        await self._end(episode, Call(Message(), digest=b"idle_ttl"), StopReason.IDLE_TTL)

    async def page(self, *, limit: int, before: tuple[float, str] | None, where: Filter) -> list[EpisodeRecord]:
        """Newest first, created before `before` = (created_at, episode_id)."""
        return await self.store.episodes(limit=limit, before=before, where=where)

    async def steps(self, episode_id: str) -> tuple[EpisodeRecord, list[Step]]:
        """The episode and its rows. Raises NotFound, Gone."""
        return await self._live.trajectory(episode_id)

    async def act(self, episode_id: str, call: Call) -> Answer:
        """Answers with the step's action once it is committed. Raises EpisodicError, EngineUnavailable,
        StoreUnavailable; then nothing was committed, but for an outcome the store could not tell: a retry settles it.
        """
        with metrics.ACTIVE_ACTS.track_inprogress():
            try:
                return await self._act(episode_id, call)
            except EpisodicError as error:
                metrics.ACTS.labels(error.code).inc()
                raise
            except EngineUnavailable:
                metrics.ACTS.labels("engine_unavailable").inc()
                raise
            except StoreUnavailable:
                metrics.ACTS.labels("store_unavailable").inc()
                raise
            except Exception:
                metrics.ACTS.labels("internal_error").inc()
                raise

    async def abort_acts(self) -> int:
        """Aborts the acts whose commit has not begun, and those that come; their callers hear that the service drains.
        Returns how many were in flight."""
        self._aborts = True
        flights = [episode.flight for episode in self._live]
        await asyncio.sleep(0)  # one that has not begun could not say why it ends
        return sum(flight.task.cancel() for flight in flights if flight and not flight.committing)

    async def end(self, episode_id: str, call: Call, stop_reason: StopReason) -> EpisodeRecord:
        """Ends an episode; an ended one stays as it is. Raises NotFound, Gone, Conflict (episode_busy)."""
        await self._twice(episode_id, lambda episode: self._end(episode, call, stop_reason))
        return await self.get(episode_id)

    async def delete(self, episode_id: str) -> None:
        """Raises NotFound, Gone, Conflict (episode_busy)."""
        episode = self._live.peek(episode_id)
        if episode and episode.flight:
            raise _busy()
        await self._live.record(episode_id)
        if not await self.store.delete(episode_id):
            raise episode_deleted(public_id(episode_id))
        self._live.drop(episode_id)

    async def _act(self, episode_id: str, call: Call) -> Answer:
        self._refuse_while_draining()
        return await self._twice(episode_id, lambda episode: self._answer(episode, call), call.emit)

    async def _twice(
        self, episode_id: str, attempt: Callable[[Episode], Awaitable[T]], listener: Listener | None = None
    ) -> T:
        """The attempt on the live episode; if another replica took it further meanwhile, on the store's copy, unless
        `listener` has heard of the first attempt's already."""
        episode = await self._live.find(episode_id)
        try:
            return await attempt(episode)
        except Conflict as conflict:
            behind = conflict.code == "step_conflict" or (
                conflict.code == "episode_busy" and await self._was_overtaken(episode)
            )
            if not behind or (listener and listener.heard):
                raise
        if self._live.peek(episode_id) is episode and not episode.flight:
            self._live.drop(episode_id)
        return await attempt(await self._live.find(episode_id))

    async def _was_overtaken(self, episode: Episode) -> bool:
        """Whether the step in flight here was taken at another replica. If so, returns once the flight has ended."""
        record = await self.store.episode(episode.episode_id)
        if record is None or record.head.step <= episode.head.step:
            return False
        if flight := episode.flight:
            await asyncio.wait({flight.task})
        return True

    async def _answer(self, episode: Episode, call: Call) -> Answer:
        if replayed := await self._replay(episode, call):
            metrics.ACTS.labels("replayed").inc()
            return replayed
        flight, joined = self._flight(episode, call)
        try:
            landing = await flight.join(call.timeout_s)
        except TimeoutError as error:
            if call.timeout_s is None:
                raise
            raise DeadlineExceeded("deadline_exceeded", f"{call.timeout_s:g} s ran out.") from error
        return {**landing.step.answer, "replayed": joined or landing.replayed, "timing": landing.timing}

    async def _replay(self, episode: Episode, call: Call) -> Answer | None:
        """The stored answer if `call` asks for a committed step again."""
        index = call.step
        if call.idempotency_key in episode.keys:
            index = episode.keys[call.idempotency_key]
            if call.step not in (None, index):
                raise _mismatch()
        if index is None or index > episode.head.step:
            return None
        if index == episode.head.step and episode.head.status == "active":
            return None
        step = next(iter(await self.store.steps(episode.episode_id, index)), None)
        if step is None or (step.closing and step.digest != call.digest and call.idempotency_key not in episode.keys):
            return None
        if step.digest != call.digest:
            raise _mismatch()
        return {**_replayed(step), "episode_id": public_id(episode.episode_id)}  # a fork's early steps are its parent's

    def _flight(self, episode: Episode, call: Call) -> tuple[Flight, bool]:
        """The act in flight that `call` repeats, or a new one; and whether it was joined."""
        flight, head = episode.flight, episode.head
        if flight is None:
            episode.check_active()
            if call.step not in (None, head.step):
                detail = f"The next step is {head.step}, not {call.step}."
                raise Conflict("step_conflict", detail, expected_step=head.step)
            episode.check_call(call)
            return episode.launch(call, self._decide(episode, call)), False
        same_step = call.step is not None and call.step == head.step
        same_key = call.idempotency_key is not None and call.idempotency_key == flight.call.idempotency_key
        if not same_step and not same_key:
            raise _busy()
        if call.digest != flight.call.digest:
            raise _mismatch() if same_key or flight.call.step is not None else _busy()
        return flight, True

    async def _decide(self, episode: Episode, call: Call) -> Landing:
        turn = self.admission.turn(episode.config.tenant) if call.asks_the_policy else nullcontext()
        try:
            if self._aborts:
                raise _draining()
            async with turn:
                began = time.perf_counter()
                step, stop_reason = await self.agent.act(episode, call)
        except ActionSpaceError as error:  # the policy's tokenizer is another than when the episode was opened
            raise Unprocessable(str(error), "action_space") from error
        except asyncio.CancelledError:
            if self._aborts:
                raise _draining() from None
            raise
        decided = time.perf_counter()
        committed = await self._commits.commit(episode, step, stop_reason)
        ended = time.perf_counter()
        timing = {
            "queue_s": began - call.arrived,
            "engine_s": decided - began,
            "store_s": ended - decided,
            "total_s": ended - call.arrived,
        }
        if committed is not step:
            metrics.ACTS.labels("replayed").inc()
            return Landing(committed, timing, replayed=True)
        _count(step, timing)
        return Landing(step, timing)

    async def _end(self, episode: Episode, call: Call, stop_reason: StopReason) -> None:
        flight = episode.flight
        if flight is None and episode.head.status == "active":
            flight = episode.launch(call, self._close(episode, call, stop_reason))
        elif flight and flight.call.digest != call.digest:
            raise _busy()
        if flight:
            await flight.join(None)

    async def _close(self, episode: Episode, call: Call, stop_reason: StopReason) -> Landing:
        return Landing(await self._commits.commit(episode, episode.closing_step(call), stop_reason), dict(_NO_TIME))

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise _draining()


def _replayed(step: Step) -> Answer:
    return {
        **step.answer,
        "replayed": True,
        "timing": dict(_NO_TIME),
    }


def _count(step: Step, timing: dict[str, float]) -> None:
    metrics.record_act("done" if step.closing else "acted", timing, step.answer["usage"])
    if failure := step.answer["parse_failure"]:
        metrics.PARSE_FAILURES.labels(failure["kind"]).inc()


def _draining() -> Unavailable:
    return Unavailable("draining", "The service is shutting down.", retry_after_s=5)


def _mismatch() -> Conflict:
    return Conflict("idempotency_mismatch", "The same step or Idempotency-Key came with another body.")


def _busy() -> Conflict:
    return Conflict("episode_busy", "Another act is in flight for this episode.")
