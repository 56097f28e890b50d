"""Owns one live episode: its token log, its head, and the one act that may be in flight."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from service.agent.action_spaces import ActionSpaceError, DiscreteSpace, RefusedSpace
from service.agent.options import Options
from service.engine.base import OnText
from service.engine.token_log import TokenLog
from service.errors import Conflict, Unprocessable
from service.trajectory import (
    EMPTY_SPAN,
    Decision,
    EpisodeConfig,
    EpisodeHead,
    EpisodeRecord,
    JsonValue,
    Message,
    Span,
    Step,
    StopReason,
    Usage,
    public_id,
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """An action that somebody other than the policy chose."""

    action: JsonValue


Kind = Literal["reasoning", "text"]


class Listener:
    """Hears what the policy writes as it writes it; `heard` whether it wrote something."""

    def __init__(self, emit: Callable[[Kind, str], None]) -> None:
        self._emit = emit
        self.heard = False

    def __call__(self, kind: Kind, delta: str) -> None:
        self.heard = True
        self._emit(kind, delta)


@dataclass(frozen=True, slots=True)
class Call:
    """One act as it arrived: the message, what identifies a retry of it, its deadline in seconds, the action where
    somebody else chose it, and who hears the tokens as they come. A retry that joins it hears the end alone."""

    message: Message
    digest: bytes
    step: int | None = None
    idempotency_key: str | None = None
    timeout_s: float | None = None
    recorded: Recorded | None = None
    emit: Listener | None = None
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def asks_the_policy(self) -> bool:
        return self.recorded is None and self.message.ends is None

    def listener(self, kind: Kind) -> OnText | None:
        return None if self.emit is None else partial(self.emit, kind)


@dataclass(frozen=True, slots=True)
class Landing:
    """A committed step, and the seconds its parts took; `replayed`: another replica committed it for the same call."""

    step: Step
    timing: dict[str, float]
    replayed: bool = False


@dataclass(slots=True)
class Flight:
    """An act on its way. Retries join it; when the last waiter leaves before the commit began, it is cancelled."""

    call: Call
    task: "asyncio.Task[Landing]"
    num_waiters: int = 0
    committing: bool = False

    async def join(self, timeout_s: float | None) -> Landing:
        """The act's step and timing. Raises TimeoutError when the time ran out and nothing was committed."""
        self.num_waiters += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.task)
        except TimeoutError:
            if self.committing:
                return await asyncio.shield(self.task)
            raise
        finally:
            self.num_waiters -= 1
            if not self.num_waiters and not self.committing:
                self.task.cancel()


class Episode:
    """An episode in memory; the store's copy is the truth, and this one is dropped whenever the two may differ."""

    __slots__ = ("_flight", "config", "head", "keys", "log", "options")

    def __init__(self, record: EpisodeRecord, options: Options, steps: Sequence[Step] = ()) -> None:
        self.config: EpisodeConfig = record.config
        self.head: EpisodeHead = record.head
        self.options = options
        self.log = _log_of(steps)
        # A fork's callers have not used the keys of its ancestors' steps.
        own = [step for step in steps if step.episode_id == self.episode_id]
        self.keys: dict[str, int] = {step.idempotency_key: step.index for step in own if step.idempotency_key}
        self._flight: Flight | None = None

    @property
    def flight(self) -> Flight | None:
        """The act in flight. One that all its callers left is on its way out, and nobody may join it."""
        return None if self._flight is None or self._flight.task.cancelling() else self._flight

    @property
    def episode_id(self) -> str:
        return self.config.episode_id

    @property
    def policy(self) -> str:
        return self.config.request["policy"]

    def launch(self, call: Call, work: Coroutine[None, None, Landing]) -> Flight:
        """Starts the one act in flight; it clears itself before any waiter hears of its end."""
        task = asyncio.create_task(work)
        self._flight = flight = Flight(call, task)
        task.add_done_callback(self._landed)
        return flight

    def _landed(self, task: "asyncio.Task[Landing]") -> None:
        if self._flight and self._flight.task is task:
            self._flight = None
        if not task.cancelled():
            task.exception()  # retrieved: the last waiter may be gone

    @property
    def max_steps_reached(self) -> bool:
        return self.options.max_steps is not None and self.head.step >= self.options.max_steps

    def check_active(self) -> None:
        if self.head.status == "ended":
            reason = self.head.stop_reason
            raise Conflict("episode_ended", f"The episode ended ({reason}).", stop_reason=reason)

    def check_call(self, call: Call) -> None:
        """Raises Unprocessable for what this episode cannot take."""
        self.check_message(call.message)
        if call.recorded is None:
            return
        if call.message.ends:
            raise Unprocessable("what ends the episode has no action; record the action, then end it", "action")
        try:
            text = self.options.action_space.write(call.recorded.action)
        except ActionSpaceError as error:
            raise Unprocessable(str(error), "action") from error
        if call.message.legal_actions is not None and text not in call.message.legal_actions:
            raise Unprocessable(f"{text!r} is not among legal_actions", "action")

    def check_message(self, message: Message) -> None:
        """Raises Unprocessable for a message that this episode cannot take."""
        legal = message.legal_actions
        if message.observation is None and message.ends is None:
            raise Unprocessable("an observation is required unless the episode ends here", "observation")
        if message.success is not None and message.ends is None:
            raise Unprocessable("success is told only when the episode ends", "success")
        if message.reward is not None and not math.isfinite(self.head.episode_return + message.reward):
            raise Unprocessable("the sum of the episode's rewards is too large a number", "reward")
        if isinstance(self.options.action_space, RefusedSpace) and message.ends is None:
            raise Unprocessable(self.options.action_space.reason, "action_space")
        if legal is None:
            return
        space = self.options.action_space
        if not isinstance(space, DiscreteSpace):
            raise Unprocessable("legal_actions narrows a discrete action space only", "legal_actions")
        if not legal or len(set(legal)) < len(legal):
            raise Unprocessable("legal_actions must be distinct and not empty", "legal_actions")
        if unknown := set(legal) - set(space.actions):
            raise Unprocessable(f"{min(unknown)!r} is not in the action space", "legal_actions")

    def fit(self, turn_len: int, reserve: int) -> int | None:
        """Where the window of the next step starts, so that turn and reply fit; None if they do not."""
        limit = self.options.max_context_tokens - reserve
        if self.options.overflow == "slide":
            return self.log.fit(turn_len, limit)
        return self.log.start if self.log.window_len(self.log.start) + turn_len <= limit else None

    def overflow(self) -> StopReason:
        """Why the episode ends when its context is full. Raises Conflict where the caller asked not to end it."""
        if self.options.overflow != "end":
            raise Conflict("context_overflow", "The observation and its action no longer fit into the context.")
        return StopReason.CONTEXT_OVERFLOW

    def next_step(
        self, call: Call, decision: Decision, span: Span, turn_len: int, start: int, policy_version: str
    ) -> Step:
        """The step of a decision: its span, of which the first `turn_len` tokens are the turn, behind a window that
        begins at `start`."""
        answer = _answer(self.episode_id, self.head.step, policy_version, decision)
        step = self._step(call, answer, span, start, closing=False)
        if self.options.reasoning is None or self.options.reasoning.keep or decision.dropped == (0, 0):
            return step
        return replace(step, dropped=(turn_len + decision.dropped[0], turn_len + decision.dropped[1]))

    def closing_step(self, call: Call) -> Step:
        """The row of a message that ends the episode: no action is asked for, of any policy."""
        answer = _answer(self.episode_id, self.head.step, self.config.policy_version, None)
        return self._step(call, answer, EMPTY_SPAN, self.log.start, closing=True)

    def _step(self, call: Call, answer: dict[str, JsonValue], span: Span, start: int, *, closing: bool) -> Step:
        return Step(
            episode_id=self.episode_id,
            index=self.head.step,
            message=call.message,
            closing=closing,
            span=span,
            window_start=start,
            answer=answer,
            digest=call.digest,
            created_at=time.time(),
            idempotency_key=call.idempotency_key,
        )

    def head_after(self, step: Step, stop_reason: StopReason | None) -> EpisodeHead:
        """The head once `step` is committed."""
        head, message = self.head, step.message
        return replace(
            head,
            step=head.step + (not step.closing),
            status="ended" if stop_reason else "active",
            stop_reason=stop_reason,
            success=message.success if stop_reason else None,
            episode_return=head.episode_return + (message.reward or 0.0),
            num_tokens=head.num_tokens + len(step.span.token_ids),
            updated_at=step.created_at,
            ended_at=step.created_at if stop_reason else None,
            expires_at=None if stop_reason else self.options.expires_at(step.created_at),
        )

    def forks(self, rows: Sequence[Step], episode_ids: Sequence[str], group: str, digest: bytes) -> "list[Episode]":
        """Episodes under these ids that share `rows`, this one's first steps, and go on from there."""
        now = time.time()
        head = EpisodeHead(
            step=len(rows),
            episode_return=sum(row.message.reward or 0.0 for row in rows),
            num_tokens=sum(len(row.span.token_ids) for row in rows),
            updated_at=now,
            expires_at=self.options.expires_at(now),
        )
        forks = [self._fork(head, name, group, digest, place) for place, name in enumerate(episode_ids)]
        log = _log_of(rows)
        for fork in forks:
            fork.log = log.copy()
        return forks

    def _fork(self, head: EpisodeHead, episode_id: str, group: str, digest: bytes, place: int) -> "Episode":
        request: dict[str, Any] = {**self.config.request, "group": group}
        options = self.options
        if options.sampling.seed is not None and place:
            seed = random.Random(f"{options.sampling.seed}:{head.step}:{place}").getrandbits(62)  # noqa: S311
            request["sampling"] = {**(self.config.request["sampling"] or {}), "seed": seed}
            options = replace(options, sampling=replace(options.sampling, seed=seed))
        config = replace(
            self.config,
            episode_id=episode_id,
            request=request,
            digest=digest,
            created_at=head.updated_at + place * 1e-6,  # so that lists have them in order
            parent=(self.episode_id, head.step),
        )
        return Episode(EpisodeRecord(config, head), options)

    def record(self, step: Step, head: EpisodeHead) -> None:
        """Takes over a committed step."""
        self.head = head
        if step.idempotency_key:
            self.keys[step.idempotency_key] = step.index
        if not step.closing:
            self.log.append(step.span, step.dropped)
            self.log.start = step.window_start


def _log_of(steps: Sequence[Step]) -> TokenLog:
    rows = [step for step in steps if not step.closing]
    log = TokenLog(start=rows[-1].window_start if rows else 1)
    for row in rows:
        log.append(row.span, row.dropped)
    return log


def _answer(episode_id: str, index: int, policy_version: str, decision: Decision | None) -> dict[str, JsonValue]:
    """What POST /act answers, but for `replayed` and `timing`."""
    failure = decision.parse_failure if decision else None
    return {
        "episode_id": public_id(episode_id),
        "step": index,
        "action": decision.action if decision else None,
        "text": decision.text if decision else None,
        "reasoning": decision.reasoning if decision else None,
        "action_probs": decision.action_probs if decision else None,
        "logprob": decision.logprob if decision else None,
        "finish_reason": decision.finish_reason if decision else None,
        "parse_failure": {"kind": failure.kind, "detail": failure.detail} if failure else None,
        "done": decision is None,
        "policy_version": policy_version,
        "usage": _usage(decision.usage if decision else Usage()),
    }


def _usage(usage: Usage) -> dict[str, JsonValue]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }
