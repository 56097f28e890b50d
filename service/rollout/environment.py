"""Creates environments by their Gymnasium id, each with its text description."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import gymnasium

from service.environments import TextDescription, describe

STEP_CAP = 200
"""The number of steps after which an episode is truncated if neither the environment nor the caller sets a limit."""


class UnusableEnvironment(Exception):
    """The environment cannot be played: unknown id, missing dependency, invalid arguments, or unsupported spaces."""


class RewardNotFinite(Exception):
    """The environment returned NaN or infinity as a reward. JSON cannot represent it, and no mean can include it."""


@dataclass(frozen=True, slots=True)
class TextEnvironment:
    """One environment instance with its text description. It plays one episode at a time."""

    env: gymnasium.Env[Any, Any]
    text: TextDescription


@dataclass(frozen=True, slots=True)
class EnvironmentFactory:
    """Creates instances of one environment. `max_episode_steps` overrides the environment's own limit."""

    env_id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_episode_steps: int | None = None

    def make(self) -> TextEnvironment:
        """Creates one instance. Raises UnusableEnvironment with the reason."""
        try:
            env = gymnasium.make(self.env_id, max_episode_steps=self._step_limit(), **self.kwargs)
            return TextEnvironment(env, describe(env))
        except Exception as error:
            raise UnusableEnvironment(f"{self.env_id}: {str(error) or type(error).__name__}") from error

    def _step_limit(self) -> int | None:
        """The limit to pass to Gymnasium. None keeps the environment's own limit."""
        if self.max_episode_steps is not None:
            return self.max_episode_steps
        return None if gymnasium.spec(self.env_id).max_episode_steps else STEP_CAP


def finite(reward: Any) -> float:
    """The reward as a float. Raises RewardNotFinite for NaN and infinity."""
    number = float(reward)
    if not isfinite(number):
        raise RewardNotFinite(f"the environment returned {number} as a reward; rewards must be finite numbers")
    return number
