"""Owns the making of environments by Gymnasium id, each with its description in text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import gymnasium

from service.environments import TextDescription, describe

STEP_CAP = 200
"""The length at which an episode is truncated where neither the environment nor the caller sets one."""


class UnusableEnvironment(Exception):
    """No environment to play: unknown id, missing dependency, refused arguments, or spaces that text cannot carry."""


class RewardNotFinite(Exception):
    """The environment gave NaN or infinity as a reward, which neither JSON nor a mean can hold."""


@dataclass(frozen=True, slots=True)
class TextEnvironment:
    """One environment instance and how it speaks: plays one episode at a time."""

    env: gymnasium.Env[Any, Any]
    text: TextDescription


@dataclass(frozen=True, slots=True)
class EnvironmentFactory:
    """Makes instances of one environment. `max_episode_steps` overrides the environment's own limit."""

    env_id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_episode_steps: int | None = None

    def make(self) -> TextEnvironment:
        """Raises UnusableEnvironment with a sentence that says why."""
        try:
            env = gymnasium.make(self.env_id, max_episode_steps=self._step_limit(), **self.kwargs)
            return TextEnvironment(env, describe(env))
        except Exception as error:
            raise UnusableEnvironment(f"{self.env_id}: {str(error) or type(error).__name__}") from error

    def _step_limit(self) -> int | None:
        """None leaves the environment's own."""
        if self.max_episode_steps is not None:
            return self.max_episode_steps
        return None if gymnasium.spec(self.env_id).max_episode_steps else STEP_CAP


def finite(reward: Any) -> float:
    number = float(reward)
    if not isfinite(number):
        raise RewardNotFinite(f"the environment gave {number} as a reward")
    return number
