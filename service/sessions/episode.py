"""An episode in memory: its state, its history, and its act in flight."""

import asyncio
import math
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from service.agent.agent import View
from service.agent.options import Options
from service.engine.base import ActionSpaceRefused, History, Recorded
from service.errors import Conflict, Unprocessable
from service.sessions.acts import ActRequest, ActResult, InFlightAct
from service.trajectory import (
    EMPTY_SPAN,
    Decision,
    EpisodeConfig,
    EpisodeState,
    JsonValue,
    Message,
    Span,
    Step,
    StopReason,
    StoredEpisode,
    Usage,
    public_id,
)


class Episode:
    """An episode in memory. The store is authoritative: whenever this copy may differ, it is dropped from the cache."""

    __slots__ = ("_in_flight", "config", "history", "keys", "options", "state")

    def __init__(self, stored: StoredEpisode, options: Options, history: History, steps: Sequence[Step] = ()) -> None:
        """`history`: an empty history of the engine. `steps`: the committed steps, which are added to it."""
        self.config: EpisodeConfig = stored.config
        self.state: EpisodeState = stored.state
        self.options = options
        self.history = _filled(history, steps)
        self.keys: dict[str, int] = keys_of(self.episode_id, steps)
        self._in_flight: InFlightAct | None = None

    @property
    def episode_id(self) -> str:
        return self.config.episode_id

    @property
    def view(self) -> View:
        """The read-only view of the episode for the agent."""
        config = self.config
        pin = config.policy_pin
        return View(config.tenant, config.request["policy"], pin, self.state.step, self.options, self.history)

    @property
    def in_flight(self) -> InFlightAct | None:
        """The act in flight, or None. An act that is being cancelled does not count, so no retry can join it."""
        act = self._in_flight
        return None if act is None or act.task.cancelling() else act

    def start(self, request: ActRequest, work: Coroutine[None, None, ActResult]) -> InFlightAct:
        """Starts the act in flight. When it ends, it is cleared before any waiting caller receives the result."""
        self._in_flight = act = InFlightAct(request, asyncio.create_task(work))
        act.task.add_done_callback(lambda _: self._clear(act))
        return act

    def _clear(self, act: InFlightAct) -> None:
        if self._in_flight is act:
            self._in_flight = None
        act.settle()

    def check_active(self) -> None:
        """Raises Conflict (episode_ended) if the episode has ended."""
        check_active(self.state)

    def check_request(self, request: ActRequest) -> Recorded | None:
        """Checks whether this episode can accept the request.

        Returns the action that the caller chose, with its text; None if the policy decides. Raises Unprocessable.
        """
        self._check_message(request.message)
        return None if request.recorded is None else self._checked_action(request.recorded.value, request.message)

    def _checked_action(self, action: JsonValue, message: Message) -> Recorded:
        if message.ends:
            raise Unprocessable(
                "a message that ends the episode has no action; record the action first, then end it", "action"
            )
        space = self.options.action_space.narrowed(message.legal_actions)
        try:
            return Recorded(action, space.write(action))
        except ActionSpaceRefused as error:
            raise Unprocessable(str(error), "action") from error

    def _check_message(self, message: Message) -> None:
        if message.observation is None and message.ends is None:
            raise Unprocessable("observation is required unless terminated or truncated is true", "observation")
        if message.success is not None and message.ends is None:
            raise Unprocessable("success is only allowed with terminated or truncated", "success")
        return_after(self.state, message)
        if message.ends is None or message.legal_actions is not None:
            try:
                self.options.action_space.narrowed(message.legal_actions)
            except ActionSpaceRefused as error:
                raise Unprocessable(str(error), error.field) from error

    def ends_with(self, message: Message) -> StopReason | None:
        """Returns the stop reason if this message ends the episode without an action; otherwise None."""
        max_steps = self.options.max_steps
        if message.ends is None and max_steps is not None and self.state.step >= max_steps:
            return StopReason.MAX_STEPS
        return message.ends

    def overflow(self) -> StopReason:
        """Returns the stop reason when the context is full. Raises Conflict unless the episode ends on overflow."""
        if self.options.overflow != "end":
            detail = "The observation and its action exceed the context. Shorten the observation or end the episode."
            raise Conflict("context_overflow", detail)
        return StopReason.CONTEXT_OVERFLOW

    def next_step(self, request: ActRequest, decision: Decision) -> Step:
        """Returns the step for a decision, with the seconds that the act has taken so far."""
        answer = _answer(self.episode_id, self.state.step, decision.policy_version, decision)
        return _step(
            self.config,
            self.state,
            request,
            answer,
            decision.span,
            window_start=decision.window_start,
            dropped=decision.dropped,
            temperature=self.options.sampling.temperature,
            seconds=None if request.recorded else time.perf_counter() - request.arrived,
        )

    def closing_step(self, request: ActRequest) -> Step:
        """Returns the closing step, for a message that ends the episode. It has no action."""
        return closing_step(self.config, self.state, request)

    def state_after(self, step: Step, stop_reason: StopReason | None) -> EpisodeState:
        """Returns the state after the commit of `step`. Raises Unprocessable."""
        if stop_reason:
            return ended_state(self.state, step, stop_reason)
        return EpisodeState(
            step=self.state.step + 1,
            episode_return=return_after(self.state, step.message),
            num_tokens=self.state.num_tokens + len(step.span.token_ids),
            num_parse_failures=_added(self.state.num_parse_failures, _has_failed(step)),
            num_recorded=_added(self.state.num_recorded, _is_recorded(step)),
            updated_at=step.created_at,
            expires_at=self.options.expires_at(step.created_at),
        )

    def advance(self, step: Step, state: EpisodeState) -> None:
        """Updates the episode after the commit of `step`."""
        self.state = state
        if step.idempotency_key:
            self.keys[step.idempotency_key] = step.index
        if not step.closing:
            self.history.append(step)

    def forks(
        self, rows: Sequence[Step], episode_ids: Sequence[str], group: str, digest: bytes, history: History
    ) -> "list[Episode]":
        """Returns episodes with these ids that continue after `rows`, the first steps of this episode.

        `history` is an empty history of the engine.
        """
        now = round(time.time(), 6)
        state = EpisodeState(
            step=len(rows),
            episode_return=_sum_of_rewards(rows),
            num_tokens=sum(len(row.span.token_ids) for row in rows),
            num_parse_failures=sum(map(_has_failed, rows)),
            num_recorded=sum(map(_is_recorded, rows)),
            updated_at=now,
            expires_at=self.options.expires_at(now),
        )
        shared = _filled(history, rows)
        return [
            self._fork(state, episode_id, group, digest, place, shared.copy())
            for place, episode_id in enumerate(episode_ids)
        ]

    def _fork(
        self, state: EpisodeState, episode_id: str, group: str, digest: bytes, place: int, history: History
    ) -> "Episode":
        request: dict[str, Any] = {**self.config.request, "group": group}
        options = self.options
        if options.sampling.seed is not None and place:
            seed = random.Random(f"{options.sampling.seed}:{state.step}:{place}").getrandbits(62)  # noqa: S311
            request["sampling"] = {**(self.config.request["sampling"] or {}), "seed": seed}
            options = replace(options, sampling=replace(options.sampling, seed=seed))
        config = replace(
            self.config,
            episode_id=episode_id,
            request=request,
            digest=digest,
            created_at=round(
                state.updated_at + place * 1e-6, 6
            ),  # distinct times, so that lists show the forks in order
            parent=(self.episode_id, state.step),
        )
        return Episode(StoredEpisode(config, state), options, history)


def keys_of(episode_id: str, steps: Sequence[Step]) -> dict[str, int]:
    """Returns the indices of the steps by their idempotency keys.

    A fork ignores the keys of inherited steps: they belong to requests to its ancestors.
    """
    own = [step for step in steps if step.episode_id == episode_id]
    return {step.idempotency_key: step.index for step in own if step.idempotency_key}


def closing_step(config: EpisodeConfig, state: EpisodeState, request: ActRequest) -> Step:
    """Returns the step that ends an episode in this state. It has no action."""
    answer = _answer(config.episode_id, state.step, config.policy_version, None)
    return _step(config, state, request, answer, EMPTY_SPAN, closing=True)


def ended_state(state: EpisodeState, step: Step, stop_reason: StopReason) -> EpisodeState:
    """Returns the state of an episode that ends with the closing step `step`. Raises Unprocessable."""
    return replace(
        state,
        status="ended",
        stop_reason=stop_reason,
        success=step.message.success,
        episode_return=return_after(state, step.message),
        updated_at=step.created_at,
        ended_at=step.created_at,
        expires_at=None,
    )


def return_after(state: EpisodeState, message: Message) -> float:
    """Returns the episode's return after the reward of this message. Raises Unprocessable if it is not finite."""
    total = state.episode_return + (message.reward or 0.0)
    if not math.isfinite(total):
        raise Unprocessable("the sum of the episode's rewards is too large for a 64-bit float", "reward")
    return total


def _has_failed(step: Step) -> bool:
    return step.answer.get("parse_failure") is not None


def _is_recorded(step: Step) -> bool:
    return step.answer.get("finish_reason") == "recorded"


def _added(count: int | None, counts: bool) -> int | None:
    """Returns the count with one more if `counts`; None if it is unknown."""
    return None if count is None else count + counts


def _sum_of_rewards(steps: Sequence[Step]) -> float:
    """Adds the rewards in the order in which `return_after` added them. `sum` rounds differently and may overflow."""
    total = 0.0
    for step in steps:
        total += step.message.reward or 0.0
    return total


def _step(
    config: EpisodeConfig,
    state: EpisodeState,
    request: ActRequest,
    answer: dict[str, JsonValue],
    span: Span,
    *,
    closing: bool = False,
    window_start: int = 0,
    dropped: tuple[int, int] = (0, 0),
    temperature: float | None = None,
    seconds: float | None = None,
) -> Step:
    return Step(
        episode_id=config.episode_id,
        index=state.step,
        message=request.message,
        closing=closing,
        span=span,
        window_start=window_start,
        answer=answer,
        digest=request.digest,
        created_at=time.time(),
        idempotency_key=request.idempotency_key,
        dropped=dropped,
        temperature=temperature,
        seconds=seconds,
    )


def check_active(state: EpisodeState) -> None:
    """Raises Conflict (episode_ended) if the episode has ended."""
    if state.status == "ended":
        reason = state.stop_reason
        raise Conflict("episode_ended", f"The episode has ended ({reason}). Open another one.", stop_reason=reason)


def _filled(history: History, steps: Sequence[Step]) -> History:
    """Adds the steps that have an action to the history, and returns it."""
    for step in steps:
        if not step.closing:
            history.append(step)
    return history


def _answer(episode_id: str, index: int, policy_version: str, decision: Decision | None) -> dict[str, JsonValue]:
    """Returns the answer to POST /act, without `replayed` and `timing`."""
    failure = decision.parse_failure if decision else None
    usage = decision.usage if decision else Usage()
    return {
        "episode_id": public_id(episode_id),
        "step": index,
        "action": decision.action if decision else None,
        "text": decision.text if decision else None,
        "reasoning": decision.reasoning if decision else None,
        "action_probs": decision.action_probs if decision else None,
        "legal_mass": decision.legal_mass if decision else None,
        "logprob": decision.logprob if decision else None,
        "finish_reason": decision.finish_reason if decision else None,
        "parse_failure": {"kind": failure.kind, "detail": failure.detail} if failure else None,
        "done": decision is None,
        "policy_version": policy_version,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
    }
