"""Owns what an episode was opened with, made ready: defaults filled in, limits checked, the action space built."""

from dataclasses import dataclass, replace
from typing import Any, cast

from service.actions import ActionSpace, TextSpace, discrete_space, json_space, regex_space, tools_space
from service.engine.base import EngineInfo
from service.errors import Unprocessable
from service.prompt import system_text
from service.trajectory import Overflow, Sampling


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
        """Raises ActionSpaceError for a space that cannot be, Unprocessable for limits that leave no room."""
        context: dict[str, Any] = request.get("context") or {}
        given: dict[str, Any] = request.get("sampling") or {}
        limit = min(context.get("max_tokens") or info.max_model_len, info.max_model_len)
        asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if asked.get("max_tokens", 0) >= limit:
            raise Unprocessable(f"max_tokens must be below the context's {limit} tokens", "sampling", "max_tokens")
        asked["stop"] = tuple(asked.get("stop", ()))
        sampling = replace(info.default_sampling, **asked)
        thought: dict[str, Any] | None = request.get("reasoning")
        reasoning = Reasoning(thought["max_tokens"], thought.get("history") != "drop") if thought else None
        room = limit - reasoning.max_tokens if reasoning else limit
        if room <= asked.get("max_tokens", 1):
            raise Unprocessable(
                f"the thought must leave room in the context's {limit} tokens", "reasoning", "max_tokens"
            )
        return cls(
            system=system_text(request),
            action_space=_action_space(request.get("action_space") or {"type": "text"}),
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, max(room // 2, 1))),
            reasoning=reasoning,
            overflow=context.get("overflow", "slide"),
            max_context_tokens=limit,
            max_steps=request.get("max_steps"),
            idle_ttl_s=request.get("idle_ttl_s"),
        )

    def expires_at(self, now: float) -> float | None:
        return None if self.idle_ttl_s is None else now + self.idle_ttl_s


def _action_space(asked: dict[str, Any]) -> ActionSpace:
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
