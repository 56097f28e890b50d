"""Owns the live episodes: opens, finds, acts, ends and deletes them, and alone calls the store.

Live episodes are a cache of the store, bounded and least recently used first out; one is dropped whenever it may
differ from the store's copy, and the next touch reads it again.
"""

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from itertools import islice
from typing import Any, TypeVar

from service import metrics
from service.actions import ActionSpaceError, DiscreteSpace, RegexSpace
from service.admission import Admission
from service.agent import Agent
from service.engine.base import ConstraintRefused, Engine, EngineInfo, EngineUnavailable
from service.episode import Call, Episode, Flight, Landing, Listener
from service.errors import (
    Conflict,
    DeadlineExceeded,
    EpisodicError,
    Gone,
    TooManyRequests,
    Unavailable,
    Unprocessable,
    episode_deleted,
    episode_not_found,
)
from service.options import Options
from service.policies import Policies
from service.prompt import Prompt, TemplateReport
from service.store.base import Commit, EpisodeExists, EpisodeGone, Filter, StepTaken, Store, StoreUnavailable
from service.sweeper import Sweeper
from service.trajectory import (
    EpisodeConfig,
    EpisodeHead,
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
        self._defaults = defaults
        self.sweeper = Sweeper(store, self.expire)
        self.draining = False
        self._aborts = False
        self._agent: Agent | None = None
        self._max_live = max_live_episodes
        self._live: OrderedDict[str, Episode] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Episode]] = {}
        self._opening: Counter[str] = Counter()

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
        """Opens an episode; returns it and whether it is new. Raises Unprocessable, Conflict, Gone."""
        self._refuse_while_draining()
        now, info = time.time(), self.agent.engine.info
        if not info.generates:
            raise Unprocessable(f"{info.model!r} does not generate: it serves /v1 and no episodes", "policy")
        name = request.get("policy") or info.model
        if name not in self.agent.policies:
            raise Unprocessable(f"the policy {name[:200]!r} is not served (GET /policy)", "policy")
        unnamed = {field: value for field, value in self._defaults.items() if request.get(field) is None}
        request = {**request, **unnamed, "policy": name}
        options = await self._checked_options(request)
        config = EpisodeConfig(episode_id, request, digest, self.agent.policies.get(name).version, now)
        record = EpisodeRecord(config, EpisodeHead(updated_at=now, expires_at=options.expires_at(now)))
        try:
            async with self._room(config.tenant):
                await self.store.create(record)
        except EpisodeExists:
            known = await self._record(episode_id)
            if known.config.digest != digest:
                raise Conflict(
                    "idempotency_mismatch", f"Episode {public_id(episode_id)!r} exists with another body."
                ) from None
            return known, False
        except TooManyRequests:
            if known := await self.opened(episode_id, digest):
                return known, False
            raise
        self._began([Episode(record, options)])
        return record, True

    async def opened(self, episode_id: str, digest: bytes) -> EpisodeRecord | None:
        """The episode, if it was opened by the same call before."""
        known = await self.store.episode(episode_id)
        return known if known and not known.deleted and known.config.digest == digest else None

    async def fork(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> tuple[list[EpisodeRecord], bool]:
        """Opens episodes that go on from the parent as it was before `at_step` (now, if None); returns them and whether
        they are new. They are of one group: `group`, or the parent's, or else its id. With a seed the first draws as
        the parent would, each other from a seed of its own. Raises NotFound, Gone, Unprocessable, Conflict.
        """
        self._refuse_while_draining()
        digest = hashlib.blake2b(digest + parent_id.encode(), digest_size=16).digest()
        try:
            forks = await self._forked(parent_id, at_step, episode_ids, group, digest)
        except (EpisodeExists, Gone, TooManyRequests) as error:
            known = [await self.opened(episode_id, digest) for episode_id in episode_ids]
            if all(known):
                return [record for record in known if record], False
            if not isinstance(error, EpisodeExists):
                raise
            raise Conflict("idempotency_mismatch", "One of these episodes exists already.") from error
        self._began(forks)
        return [EpisodeRecord(fork.config, fork.head) for fork in forks], True

    async def _forked(
        self, parent_id: str, at_step: int | None, episode_ids: Sequence[str], group: str | None, digest: bytes
    ) -> list[Episode]:
        parent = await self._episode(parent_id)
        rows = [row for row in await self.store.steps(parent_id) if not row.closing]
        step = len(rows) if at_step is None else at_step
        if step > len(rows):
            raise Unprocessable(f"the episode has {len(rows)} steps", "at_step")
        shared_group: str = group or parent.config.request.get("group") or public_id(parent_id)
        forks = parent.forks(rows[:step], episode_ids, shared_group, digest)
        try:
            async with self._room(parent.config.tenant, len(forks)):
                await self.store.fork([EpisodeRecord(fork.config, fork.head) for fork in forks])
        except EpisodeGone as error:
            raise episode_deleted(public_id(parent_id)) from error
        return forks

    async def get(self, episode_id: str) -> EpisodeRecord:
        """Raises NotFound, Gone."""
        return await self._record(episode_id)

    async def record(self, episode_id: str, call: Call) -> Answer:
        """As `act`, with the action that somebody else chose."""
        assert call.recorded is not None
        space, action = (await self._episode(episode_id)).options.action_space, call.recorded.action
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
        record = await self._record(feedback.episode_id)
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
        found = await self.store.trajectory(episode_id)
        if found is None:
            raise episode_not_found(public_id(episode_id))
        if found[0].deleted:
            raise episode_deleted(public_id(episode_id))
        return found

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

    async def abort_acts(self) -> int:
        """Aborts the acts whose commit has not begun, and those that come; their callers hear that the service drains.
        Returns how many were in flight."""
        self._aborts = True
        flights = [episode.flight for episode in self._live.values()]
        await asyncio.sleep(0)  # one that has not begun could not say why it ends
        return sum(flight.task.cancel() for flight in flights if flight and not flight.committing)

    async def end(self, episode_id: str, call: Call, stop_reason: StopReason) -> EpisodeRecord:
        """Ends an episode; an ended one stays as it is. Raises NotFound, Gone, Conflict (episode_busy)."""
        await self._twice(episode_id, lambda episode: self._end(episode, call, stop_reason))
        return await self.get(episode_id)

    async def delete(self, episode_id: str) -> None:
        """Raises NotFound, Gone, Conflict (episode_busy)."""
        episode = self._live.get(episode_id)
        if episode and episode.flight:
            raise _busy()
        await self._record(episode_id)
        if not await self.store.delete(episode_id):
            raise episode_deleted(public_id(episode_id))
        self._drop(episode_id)

    async def _act(self, episode_id: str, call: Call) -> Answer:
        self._refuse_while_draining()
        return await self._twice(episode_id, lambda episode: self._answer(episode, call), call.emit)

    async def _twice(
        self, episode_id: str, attempt: Callable[[Episode], Awaitable[T]], listener: Listener | None = None
    ) -> T:
        """The attempt on the live episode; if another replica took it further meanwhile, on the store's copy, unless
        `listener` has heard of the first attempt's already."""
        episode = await self._episode(episode_id)
        try:
            return await attempt(episode)
        except Conflict as conflict:
            if conflict.code != "step_conflict" or (listener and listener.heard):
                raise
        if self._live.get(episode_id) is episode and not episode.flight:
            self._drop(episode_id)
        return await attempt(await self._episode(episode_id))

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
        committed = await self._commit(episode, step, stop_reason)
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
        return Landing(await self._commit(episode, episode.closing_step(call), stop_reason), dict(_NO_TIME))

    async def _commit(self, episode: Episode, step: Step, stop_reason: StopReason | None) -> Step:
        """The committed step: this one, or one that another replica committed first for a retry of the same call."""
        head = episode.head_after(step, stop_reason)
        flight = episode.flight
        if flight:
            flight.committing = True
        try:
            await self.store.commit(Commit(step, head))
            episode.record(step, head)
        except StepTaken:
            self._drop(episode.episode_id)
            return await self._winner(step, names_step=step.closing or bool(flight and flight.call.step is not None))
        except StoreUnavailable:
            self._drop(episode.episode_id)
            if not await self._is_kept(step):
                raise
        except BaseException:
            self._drop(episode.episode_id)  # the outcome is unknown: the next touch asks the store
            raise
        if stop_reason:
            metrics.EPISODES_ENDED.labels(stop_reason).inc()
        return step

    async def _is_kept(self, step: Step) -> bool:
        """Whether a commit whose answer was lost took place. Raises StoreUnavailable if that cannot be told now."""
        rows = await self.store.steps(step.episode_id, step.index)
        return bool(rows) and (rows[0].digest, rows[0].created_at) == (step.digest, step.created_at)

    async def _winner(self, step: Step, *, names_step: bool) -> Step:
        """The step that is there in place of this one, if it answers the same call: equal words alone are no proof."""
        for row in await self.store.steps(step.episode_id, step.index):
            has_key = step.idempotency_key is not None and step.idempotency_key == row.idempotency_key
            if row.digest == step.digest and (names_step or has_key):
                return row
        head = (await self._record(step.episode_id)).head
        detail = f"Another act took step {step.index}; the next is {head.step}."
        raise Conflict("step_conflict", detail, expected_step=head.step)

    async def _episode(self, episode_id: str) -> Episode:
        """The live episode, read from the store if it is not in memory; concurrent callers share one read."""
        if episode := self._live.get(episode_id):
            self._live.move_to_end(episode_id)
            return episode
        task = self._loading.get(episode_id)
        if task is None:
            task = self._loading[episode_id] = asyncio.create_task(self._load(episode_id))
            task.add_done_callback(lambda _: self._loading.pop(episode_id, None))
        return await asyncio.shield(task)

    async def _load(self, episode_id: str) -> Episode:
        info = self.agent.engine.info
        record, steps = await self.steps(episode_id)
        options = await _built(Options.restored, record.config.request, info)
        return self._keep(Episode(record, options, steps))

    async def _record(self, episode_id: str) -> EpisodeRecord:
        record = await self.store.episode(episode_id)
        if record is None:
            raise episode_not_found(public_id(episode_id))
        if record.deleted:
            raise episode_deleted(public_id(episode_id))
        return record

    async def _checked_options(self, request: dict[str, Any]) -> Options:
        """Everything that could fail at an act because of the action space fails here instead."""
        agent = self.agent
        try:
            options = await _built(Options.of, request, agent.engine.info)
            space = options.action_space
            if isinstance(space, DiscreteSpace):
                agent.prompt.trie(space.actions)
            elif space.constraint:
                await agent.engine.check(space.constraint)
        except (ActionSpaceError, ConstraintRefused) as error:
            raise Unprocessable(str(error), "action_space") from error
        return options

    def _began(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            self._keep(episode)
        metrics.EPISODES_STARTED.inc(len(episodes))
        self.sweeper.expect(episodes[0].head.expires_at)

    @asynccontextmanager
    async def _room(self, tenant: str, num_new: int = 1) -> AsyncGenerator[None]:
        """Room for more active episodes of the tenant's. Raises TooManyRequests (quota_exceeded). Those that are being
        opened here count; with several replicas, those that another opens at this moment do not."""
        allowed = self.admission.quota(tenant).active_episodes
        if allowed is None:
            yield
            return
        self._opening[tenant] += num_new
        try:
            num_active = await self.store.num_active(tenant)
            if num_active + self._opening[tenant] > allowed:
                detail = f"More than {allowed} active episodes; end some."
                raise TooManyRequests("quota_exceeded", detail, retry_after_s=1)
            yield
        finally:
            self._opening[tenant] -= num_new

    def _keep(self, episode: Episode) -> Episode:
        """The live one: it may have been read as it was being opened."""
        kept = self._live.setdefault(episode.episode_id, episode)
        for episode_id in list(islice(self._live, max(len(self._live) - self._max_live, 0))):
            if self._live[episode_id].flight is None:
                del self._live[episode_id]
        metrics.LIVE_EPISODES.set(len(self._live))
        return kept

    def _drop(self, episode_id: str) -> None:
        self._live.pop(episode_id, None)
        metrics.LIVE_EPISODES.set(len(self._live))

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise _draining()


async def _built(
    make: Callable[[dict[str, Any], EngineInfo], Options], request: dict[str, Any], info: EngineInfo
) -> Options:
    """Schemas may take a while to look at: not on the event loop."""
    space: dict[str, Any] = request.get("action_space") or {}
    if space.keys() & {"schema", "tools"}:
        return await asyncio.to_thread(make, request, info)
    return make(request, info)


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
