"""Owns what an episode was opened with, made ready: defaults filled in, limits checked, the action space built."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from service.agent.action_spaces import (
    ActionSpace,
    ActionSpaceError,
    JsonSpace,
    RefusedSpace,
    RegexSpace,
    TextSpace,
    discrete_space,
    json_space,
    regex_space,
    tools_space,
)
from service.engine.base import EngineInfo
from service.engine.prompt import system_text
from service.errors import Unprocessable
from service.trajectory import Overflow, Sampling

_CONSTRAINED = (JsonSpace, RegexSpace)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A thought before each action, of at most `max_tokens` tokens; `keep`: later prompts hold it too."""

    max_tokens: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Options:
    """What POST /episode asked for, made ready: defaults filled in, the action space built. Limits are in tokens."""

    system: str
    action_space: ActionSpace
    sampling: Sampling
    reasoning: Reasoning | None
    overflow: Overflow
    max_context_tokens: int
    max_steps: int | None
    idle_ttl_s: float | None

    @classmethod
    def of(cls, request: dict[str, Any], info: EngineInfo) -> "Options":
        """Raises ActionSpaceError for a space that cannot be, Unprocessable for limits that leave no room and for stop
        strings that would cut short what the space promises."""
        space, limit = _asked_space(request), _limit(request, info)
        sampling: dict[str, Any] = request.get("sampling") or {}
        thought: dict[str, Any] | None = request.get("reasoning")
        max_tokens: int = sampling.get("max_tokens") or 0
        if max_tokens >= limit:
            raise Unprocessable(f"max_tokens must be below the context's {limit} tokens", "sampling", "max_tokens")
        if thought and limit - thought["max_tokens"] <= max(max_tokens, 1):
            detail = f"the thought must leave room in the context's {limit} tokens"
            raise Unprocessable(detail, "reasoning", "max_tokens")
        if sampling.get("stop") and isinstance(space, _CONSTRAINED):
            raise Unprocessable("a stop string would end an action before it is whole", "sampling", "stop")
        return cls._made(request, info, space)

    @classmethod
    def restored(cls, request: dict[str, Any], info: EngineInfo) -> "Options":
        """Of an episode that was opened before, under other limits or rules perhaps: limits are cut to fit, and a space
        that would not be accepted now lets the episode do nothing but end."""
        try:
            space = _asked_space(request)
        except ActionSpaceError as error:
            space = RefusedSpace(f"the episode's action space is not accepted any more: {error}")
        return cls._made(request, info, space)

    @classmethod
    def _made(cls, request: dict[str, Any], info: EngineInfo, space: ActionSpace) -> "Options":
        given: dict[str, Any] = request.get("sampling") or {}
        asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        asked["stop"] = () if isinstance(space, _CONSTRAINED) else tuple(asked.get("stop", ()))
        sampling = replace(info.default_sampling, **asked)
        thought: dict[str, Any] | None = request.get("reasoning")
        context: dict[str, Any] = request.get("context") or {}
        limit, reasoning = _limit(request, info), None
        if thought:
            reasoning = Reasoning(min(thought["max_tokens"], limit - 2), thought.get("history") != "drop")
        room = limit - reasoning.max_tokens if reasoning else limit
        return cls(
            system=system_text(request),
            action_space=space,
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, max(room // 2, 1))),
            reasoning=reasoning,
            overflow=context.get("overflow", "slide"),
            max_context_tokens=limit,
            max_steps=request.get("max_steps"),
            idle_ttl_s=request.get("idle_ttl_s"),
        )

    def expires_at(self, now: float) -> float | None:
        return None if self.idle_ttl_s is None else now + self.idle_ttl_s


async def checked(request: dict[str, Any], info: EngineInfo) -> Options:
    """`Options.of`, off the event loop where that may take a while."""
    return await _made(Options.of, request, info)


async def restored(request: dict[str, Any], info: EngineInfo) -> Options:
    """`Options.restored`, off the event loop where that may take a while."""
    return await _made(Options.restored, request, info)


async def _made(
    make: Callable[[dict[str, Any], EngineInfo], Options], request: dict[str, Any], info: EngineInfo
) -> Options:
    space: dict[str, Any] = request.get("action_space") or {}
    if space.keys() & {"schema", "tools"}:
        return await asyncio.to_thread(make, request, info)
    return make(request, info)


def _limit(request: dict[str, Any], info: EngineInfo) -> int:
    """Tokens of the context."""
    context: dict[str, Any] = request.get("context") or {}
    return min(context.get("max_tokens") or info.max_model_len, info.max_model_len)


def _asked_space(request: dict[str, Any]) -> ActionSpace:
    asked: dict[str, Any] = request.get("action_space") or {"type": "text"}
    match asked["type"]:
        case "discrete":
            return discrete_space(tuple(cast("list[str]", asked["actions"])))
        case "json":
            return json_space(asked["schema"])
        case "regex":
            return regex_space(asked["pattern"])
        case "tools":
            return tools_space(asked["tools"])
        case _:
            return TextSpace()
