"""Operations on episodes: open, fork, act, end, delete.

A retry of a committed step is answered from the store. A retry of the act in flight joins it. Any other act is decided
by the agent and committed before it is answered.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, cast

from service.access.admission import Admission
from service.agent.agent import Agent
from service.agent.policies import Policies
from service.engine.base import ActionSpaceRefused, Engine, EngineUnavailable, Overflow, Recorded, uncancelled
from service.errors import Conflict, PolicyFailed, Unavailable, Unprocessable, episode_deleted
from service.evaluation.evaluate import evaluate
from service.evaluation.report import Question, Report
from service.filters import EpisodeFilter
from service.lifecycle import Lifecycle, Phase
from service.observability import metrics
from service.sessions.acts import ActRequest, ActResult, Deadline, InFlightAct
from service.sessions.commits import Commits
from service.sessions.creation import Creation
from service.sessions.episode import Episode
from service.sessions.episode_cache import EpisodeCache
from service.sessions.expiry import Expiry
from service.sessions.retries import act_in_flight, busy, committed_step, stored_step
from service.settings import policy_name
from service.store.base import NEWEST_FIRST, EpisodeGone, Ordering, Place, Store
from service.trajectory import (
    Feedback,
    JsonValue,
    Message,
    Step,
    StopReason,
    StoredEpisode,
    public_id,
)

Answer = dict[str, JsonValue]

_NONE: Mapping[str, JsonValue] = {}
_MAX_RACES = 3
"""How often a call is tried again because another one has committed a step meanwhile."""
_MAX_EVALUATIONS = 2
"""Reports that are made at the same time; others wait. It bounds the memory that they need."""
_LOADING = "the model is still loading; retry later"
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
        model_names: tuple[str, ...] = (),
    ) -> None:
        """`defaults`: fields of POST /episode, for requests that leave them out. `model_names`: all names of the base
        model."""
        self.store = store
        self._model_names = model_names
        self.admission = admission or Admission()
        self.lifecycle = lifecycle or Lifecycle()
        self.expiry = Expiry(store, self.expire)
        self._agent: Agent | None = None
        self._cache = EpisodeCache(store, max_cached_episodes, lambda: self.agent.engine)
        self._creation = Creation(store, self._cache, self.admission, defaults, lambda: self.agent)
        self._commits = Commits(store, self._cache)
        self._evaluating = asyncio.Semaphore(_MAX_EVALUATIONS)

    def serve(self, engine: Engine, policies: Policies | None = None) -> None:
        """Sets the engine that decides all following acts."""
        self.admission.set_num_slots(engine.info.num_slots)
        self._agent = Agent(policies or Policies(engine, self.store), engine)
        self.lifecycle.engine_serves(lambda: engine.healthy)

    @property
    def agent(self) -> Agent:
        """The current agent. Raises EngineUnavailable while the first engine is loading."""
        if self._agent is None:
            raise EngineUnavailable(_LOADING)
        return self._agent

    def refuse_acts_while_draining(self) -> None:
        """Raises Unavailable (draining) if new acts are refused. An act must pass this once, when it arrives."""
        if self.lifecycle.is_draining:
            metrics.ACTS.labels("draining").inc()
            raise _draining()

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
        self,
        tenant: str,
        where: EpisodeFilter,
        *,
        limit: int,
        before: Place | None = None,
        ordering: Ordering = NEWEST_FIRST,
    ) -> tuple[list[StoredEpisode], Place | None]:
        """Returns one page of the tenant's episodes (keyset pagination), and the place to continue from.

        before: the place that the previous page returned; None for the first page. After the last page it is None.
        """
        found = await self.store.episodes(
            limit=limit + 1, before=before, tenant=tenant, where=self._with_all_names(where), ordering=ordering
        )  # one more than the page has shows whether there is a next page
        page = found[:limit]
        return page, ordering.place(page[-1]) if len(found) > limit else None

    async def evaluate(self, tenant: str, where: EpisodeFilter, question: Question) -> Report:
        """Evaluates the tenant's episodes that match the filter; see `evaluation.evaluate`."""
        shown: Callable[[str | None], str | None] = self._shown_policy if question.by == "policy" else lambda name: name
        question = replace(question, baseline=shown(question.baseline))
        async with self._evaluating:
            return await evaluate(self.store, tenant, self._with_all_names(where), question, shown)

    def _with_all_names(self, where: EpisodeFilter) -> EpisodeFilter:
        """Returns the filter with all names of the base model, if it has one of them."""
        is_base = where.get("policy") in self._model_names
        return cast("EpisodeFilter", {**where, "policy": self._model_names}) if is_base else where

    def _shown_policy(self, name: str | None) -> str | None:
        """Returns the name under which callers see a policy."""
        return self._model_names[0] if name in self._model_names else name and policy_name(name)

    async def steps(self, episode_id: str, first: int = 0, last: int | None = None) -> tuple[StoredEpisode, list[Step]]:
        """Returns the episode and its steps from index `first` to `last`, both included. Raises NotFound, Gone."""
        return await self._cache.trajectory(episode_id, first, last)

    async def add_feedback(self, feedback: Feedback) -> tuple[Feedback, bool]:
        """Stores a rating. Returns the stored rating, and whether it is new: a retry with the same idempotency key gets
        the rating that the first request stored.

        Raises NotFound, Gone, Conflict (idempotency_mismatch), and Unprocessable for a step that does not exist.
        """
        stored = await self._cache.stored(feedback.episode_id)
        if feedback.step is not None and feedback.step >= stored.state.step:
            detail = f"there is no step {feedback.step}: the episode has {stored.state.step} steps"
            raise Unprocessable(detail, "step")
        try:
            known = await self.store.add_feedback(feedback)
        except EpisodeGone as error:
            raise episode_deleted(public_id(feedback.episode_id)) from error
        if not feedback.repeats(known):
            detail = "This Idempotency-Key was already used for another rating. A retry must send the same body."
            raise Conflict("idempotency_mismatch", detail)
        return known, known is feedback

    async def feedback(self, episode_id: str) -> list[Feedback]:
        """Returns the episode's ratings, oldest first."""
        return await self.store.feedback(episode_id)

    async def act(self, episode_id: str, request: ActRequest) -> Answer:
        """Performs an act. Returns the answer once the step is committed.

        The timeout of the request limits everything before the commit.

        Raises EpisodicError, EngineUnavailable, StoreUnavailable. No step was committed then, with one exception: after
        StoreUnavailable the result of the commit may be unknown. A retry then returns the step or repeats the act.
        """
        metrics.ACTIVE_ACTS.inc()
        try:
            async with Deadline(request) as deadline:
                try:
                    episode = await self._cache.find(episode_id)
                except EngineUnavailable:
                    return await self._replay_without_engine(episode_id, request)
                if request.sink:
                    episode = await self._refreshed(episode)
                for _ in range(_MAX_RACES):
                    try:
                        return await self._answer(episode, request, deadline)
                    except (Conflict, Unprocessable, PolicyFailed, EngineUnavailable) as refusal:
                        if request.sink and request.sink.has_emitted:
                            raise
                        if deadline.has_passed():  # while the commit was awaited, which has failed
                            raise TimeoutError from refusal
                        episode = await self._reloaded(episode, refusal)
                return await self._answer(episode, request, deadline)
        except Exception as error:
            metrics.ACTS.labels(getattr(error, "code", "internal_error")).inc()
            raise
        finally:
            metrics.ACTIVE_ACTS.dec()

    async def end(self, episode_id: str, request: ActRequest, stop_reason: StopReason) -> StoredEpisode:
        """Ends an episode. One that has ended is not changed.

        Raises NotFound, Gone, Conflict (episode_busy), Unprocessable.
        """
        for _ in range(_MAX_RACES):
            stored = await self._cache.stored(episode_id)
            if stored.state.status == "ended":
                return stored
            self._check_idle(stored)
            if ended := await self._commits.end(stored, request, stop_reason):
                return ended
        raise busy()

    async def expire(self, episode_id: str) -> None:
        """Ends an episode if its idle timeout has expired. Reads only its head, so that it displaces no cached episode.

        Raises Conflict (episode_busy) while an act is in flight, because its commit restarts the timeout.
        """
        stored = await self.store.episode(episode_id)
        expires_at = stored and stored.state.expires_at
        if stored and expires_at is not None and expires_at <= time.time():
            self._check_idle(stored)
            await self._commits.end(stored, ActRequest(Message(), digest=b"idle_ttl"), StopReason.IDLE_TTL)

    async def delete(self, episode_id: str) -> None:
        """Deletes an episode. Raises NotFound, Gone, Conflict (episode_busy)."""
        self._check_idle(await self._cache.stored(episode_id))
        if not await self.store.delete(episode_id):
            raise episode_deleted(public_id(episode_id))
        self._cache.drop_idle(episode_id)

    def forget(self, episode_id: str) -> None:
        """Must be called when an episode was deleted in the store by another part of the service."""
        self._cache.drop(episode_id)

    async def abort_acts(self) -> int:
        """Aborts the acts whose commit has not begun, and all later ones. Their callers receive 503 `draining`.

        Returns the number of acts in flight that were aborted.
        """
        self.lifecycle.enter(Phase.ABORTING)
        acts = [episode.in_flight for episode in self._cache]
        await asyncio.sleep(0)  # lets new tasks start: one that is cancelled before it starts cannot raise `draining`
        return sum(act.task.cancel() for act in acts if act and not act.is_committing)

    def _check_idle(self, stored: StoredEpisode) -> None:
        """Raises Conflict (episode_busy) if an act is in flight, unless it ends the episode or can no longer be
        committed."""
        episode = self._cache.peek(stored.config.episode_id)
        act = episode and episode.in_flight
        if episode and act and not act.request.message.ends and stored.state.step <= episode.state.step:
            raise busy()

    async def _reloaded(self, episode: Episode, refusal: Exception) -> Episode:
        """Loads the episode again if it is stale, because another replica has committed steps: the act may then be a
        retry. Otherwise raises the refusal.

        Waits until an act that another replica has overtaken has ended. Raises Gone.
        """
        head = await self._cache.stored(episode.episode_id)
        if _is_current(episode, head):
            raise refusal
        if act := episode.in_flight:
            await asyncio.wait({act.task})
        if self._cache.peek(episode.episode_id) is episode and not _is_current(episode, head):
            self._cache.drop_idle(episode.episode_id)
        return await self._cache.find(episode.episode_id)

    async def _refreshed(self, episode: Episode) -> Episode:
        """Loads the episode again if another replica has committed steps. Raises Gone, StoreUnavailable.

        A stream needs this before it starts: it cannot take back text that it generated for a step that exists.
        """
        head = await self._cache.stored(episode.episode_id)
        if episode.in_flight or _is_current(episode, head):
            return episode
        self._cache.drop_idle(episode.episode_id)
        return await self._cache.find(episode.episode_id)

    async def _answer(self, episode: Episode, request: ActRequest, deadline: Deadline) -> Answer:
        if step := await committed_step(self.store, episode, request):
            await self._cache.stored(episode.episode_id)  # raises Gone: forks keep the steps of a deleted episode
            return _replay(episode.episode_id, step)
        act, is_joined = self._act_for(episode, request)
        if is_joined:
            request.on_wait()
        result = await act.join(deadline)
        return {**result.step.answer, "replayed": is_joined or result.replayed, "timing": result.timing}

    async def _replay_without_engine(self, episode_id: str, request: ActRequest) -> Answer:
        """Answers a retry of a committed step from the store alone. Raises EngineUnavailable for any other act."""
        is_named = request.step is not None or request.idempotency_key is not None
        if is_named and (step := await stored_step(self._cache, episode_id, request)):
            return _replay(episode_id, step)
        raise EngineUnavailable(_LOADING)

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
        slots = _Slots(self.admission, episode.config.tenant, request.on_wait)
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
            if request.sink and request.sink.has_emitted:
                raise _overtaken()  # the text that was streamed is not that of the stored step
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
        with uncancelled():
            decision = await self.agent.act(episode.view, request.message, slots.slot, recorded, request.sink)
        if isinstance(decision, Overflow):
            return episode.closing_step(request), episode.overflow()
        return episode.next_step(request, decision), None

    def _refuse_while_draining(self) -> None:
        if self.lifecycle.is_draining:
            raise _draining()


def _replay(episode_id: str, step: Step) -> Answer:
    """Returns the stored answer of a committed step."""
    metrics.ACTS.labels("replayed").inc()
    own = {"episode_id": public_id(episode_id)}  # a fork inherits steps that have its parent's id
    added = {"legal_mass": None}  # steps of older versions lack it
    return {**added, **step.answer, **own, "replayed": True, "timing": dict(_NO_TIME)}


def _is_current(episode: Episode, head: StoredEpisode) -> bool:
    """Returns whether the cached episode has all steps of the store's, and is not an earlier one with the same id."""
    state, opened_at = head.state, head.config.created_at
    cached = episode.state.step, episode.state.status, episode.config.created_at
    return cached == (state.step, state.status, opened_at)


class _Slots:
    """The slots of one act in the engine.

    `first_at` is the `time.perf_counter()` at which the act got its first slot, or began if it needs none.
    """

    def __init__(self, admission: Admission, tenant: str, on_wait: Callable[[], None]) -> None:
        self._admission = admission
        self._tenant = tenant
        self._on_wait = on_wait
        self._has_begun = False
        self.first_at = time.perf_counter()

    def slot(self) -> Self:
        """Returns a context manager that waits for a slot, and occupies it. It can be entered several times at once."""
        return self

    async def __aenter__(self) -> None:
        if not self._has_begun:
            self._on_wait()
        await self._admission.acquire(self._tenant)
        if not self._has_begun:
            self._has_begun = True
            self.first_at = time.perf_counter()

    async def __aexit__(self, *_: object) -> None:
        self._admission.release(self._tenant)


def _overtaken() -> Conflict:
    detail = "Another replica committed this step while it was streamed. Send the act again to get the stored answer."
    return Conflict("step_conflict", detail)


def _draining() -> Unavailable:
    detail = "The service is shutting down. Retry after the number of seconds in Retry-After."
    return Unavailable("draining", detail, retry_after_s=5)
