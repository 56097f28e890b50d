"""The options of an episode: fills in defaults, checks limits, and builds the action space."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from service.agent.action_spaces import RefusedSpace, Space, asked_space
from service.engine.base import ActionSpaceRefused, EngineInfo, ReasoningBudget
from service.errors import Unprocessable
from service.trajectory import JsonValue, Overflow, Sampling

Request = dict[str, Any]
"""The body of POST /episode."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of an episode, ready to use.

    system: the system message.
    reasoning: None if the policy writes no thoughts.
    max_context_tokens: size of the context in tokens, prompt and completion together.
    context_template: how a transcript becomes the input of an encoder; None for the engine's own template.
    max_steps, idle_ttl_s: None for no limit.
    """

    system: str
    action_space: Space
    sampling: Sampling
    reasoning: ReasoningBudget | None
    overflow: Overflow
    max_context_tokens: int
    context_template: str | None
    max_steps: int | None
    idle_ttl_s: float | None

    @classmethod
    def of(cls, request: Request, info: EngineInfo) -> "Options":
        """Returns the options of a new episode.

        Raises ActionSpaceRefused if the action space is invalid. Raises Unprocessable if the token limits leave no room
        for the prompt, or if a stop string could cut an action short.
        """
        space, limit = _space(request), _limit(request, info)
        sampling: Request = request.get("sampling") or {}
        thought: Request | None = request.get("reasoning")
        max_tokens: int = sampling.get("max_tokens") or 0
        if max_tokens >= limit:
            raise Unprocessable(f"max_tokens must be less than the context, {limit} tokens", "sampling", "max_tokens")
        if thought and limit - thought["max_tokens"] <= max(max_tokens, 1):
            detail = f"max_tokens of thought and action together must be less than the context, {limit} tokens"
            raise Unprocessable(detail, "reasoning", "max_tokens")
        if thought and not info.thinks:
            raise Unprocessable(f"the model {info.model!r} cannot write a thought before its action", "reasoning")
        _check_template(request, info)
        if sampling.get("stop") and not _is_free_text(space):
            detail = f"stop is not supported for {space.type!r}: a stop string could cut an action short"
            raise Unprocessable(detail, "sampling", "stop")
        return cls._build(request, info, space)

    @classmethod
    def restored(cls, request: Request, info: EngineInfo) -> "Options":
        """Returns the options of a stored episode, which may have been opened under other limits.

        Limits are reduced to fit. If the service no longer accepts the action space, the episode can only be ended.
        """
        try:
            space = _space(request, strict=False)
        except ActionSpaceRefused as error:
            space = RefusedSpace(f"end the episode: its action space is not accepted any more: {error}")
        return cls._build(request, info, space)

    @classmethod
    def _build(cls, request: Request, info: EngineInfo, space: Space) -> "Options":
        given: Request = request.get("sampling") or {}
        asked: Request = {name: value for name, value in given.items() if value is not None}
        asked["stop"] = tuple(asked.get("stop", ())) if _is_free_text(space) else ()
        sampling = replace(info.default_sampling, **asked)
        thought: Request | None = request.get("reasoning")
        context: Request = request.get("context") or {}
        limit, reasoning = _limit(request, info), None
        if thought and info.thinks:
            reasoning = ReasoningBudget(min(thought["max_tokens"], limit - 2), thought.get("history") != "drop")
        room = limit - reasoning.max_tokens if reasoning else limit
        return cls(
            system=system_text(request),
            action_space=space,
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, max(room // 2, 1))),
            reasoning=reasoning,
            overflow=context.get("overflow", "slide"),
            max_context_tokens=limit,
            context_template=context.get("template") if info.context_template else None,
            max_steps=request.get("max_steps"),
            idle_ttl_s=request.get("idle_ttl_s"),
        )

    def expires_at(self, now: float) -> float | None:
        """Returns when the episode expires if no act follows, in Unix seconds; None for never."""
        return None if self.idle_ttl_s is None else now + self.idle_ttl_s


async def checked(request: Request, info: EngineInfo) -> Options:
    """Calls `Options.of`, in a thread if it may take long."""
    space, _ = asked_space(request)
    return await _run(Options.of, request, info, in_thread=space.is_slow_to_build)


async def restored(request: Request, info: EngineInfo) -> Options:
    """Calls `Options.restored`, in a thread if it may take long."""
    try:
        space, _ = asked_space(request)
    except ActionSpaceRefused:
        return Options.restored(request, info)
    return await _run(Options.restored, request, info, in_thread=space.is_slow_to_build)


async def _run(
    make: Callable[[Request, EngineInfo], Options], request: Request, info: EngineInfo, *, in_thread: bool
) -> Options:
    return await asyncio.to_thread(make, request, info) if in_thread else make(request, info)


def system_text(request: dict[str, JsonValue]) -> str:
    """Returns the system message of an episode: its instructions, its goal, and the description of its action space."""
    goal = request.get("goal")
    parts = [request.get("instructions", ""), f"Goal: {goal}" if goal else "", _space_instructions(request)]
    return "\n\n".join(part for part in parts if part)


def _space_instructions(request: Request) -> str:
    try:
        space, asked = asked_space(request)
    except ActionSpaceRefused:
        return ""
    return space.instructions(asked)


def _is_free_text(space: Space) -> bool:
    return space.choices is None and space.constraint is None


def _limit(request: Request, info: EngineInfo) -> int:
    """Returns the size of the context in tokens."""
    context: Request = request.get("context") or {}
    return min(context.get("max_tokens") or info.max_model_len, info.max_model_len)


def _check_template(request: Request, info: EngineInfo) -> None:
    """Raises Unprocessable if the model does not use the episode's template, or if it leaves out the observation."""
    context: Request = request.get("context") or {}
    template: str | None = context.get("template")
    if template is None:
        return
    if info.context_template is None:
        detail = f"the model {info.model!r} has a template of its own; only encoder-decoder models take one"
        raise Unprocessable(detail, "context", "template")
    if "{observation}" not in template:
        raise Unprocessable("the template must contain {observation}", "context", "template")


def _space(request: Request, *, strict: bool = True) -> Space:
    """Builds the action space. With `strict=False`, a keyword that cannot be enforced is not refused."""
    space, asked = asked_space(request)
    return space.of(asked if strict else {**asked, "strict": False})
