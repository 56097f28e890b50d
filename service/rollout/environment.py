"""Creates environments by their Gymnasium id, each with its text description."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import isfinite, nan
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from service.environments import Describe, TextDescription, describe

STEP_CAP = 200
"""The number of steps after which an episode is truncated if neither the environment nor the caller sets a limit."""


class UnusableEnvironment(Exception):
    """The environment cannot be played: unknown id, missing dependency, invalid arguments, or unsupported spaces."""


class RewardNotFinite(Exception):
    """A reward or a return is NaN, infinity or no number. JSON cannot represent it, and no mean can include it."""


@dataclass(frozen=True, slots=True)
class TextEnvironment:
    """One environment instance with its text description. It plays one episode at a time."""

    env: gymnasium.Env[Any, Any]
    text: TextDescription


@dataclass(frozen=True, slots=True)
class EnvironmentFactory:
    """Creates instances of one environment.

    `env_id` may name the module that registers the environment: "module:id". `describe` creates the text description of
    an instance. `max_episode_steps` overrides the environment's own limit.
    """

    env_id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_episode_steps: int | None = None
    describe: Describe = describe

    @property
    def name(self) -> str:
        """The id under which the environment is registered, without the module."""
        return self.env_id.rpartition(":")[2]

    def make(self) -> TextEnvironment:
        """Creates one instance. Raises UnusableEnvironment with the reason."""
        try:
            env = gymnasium.make(self.env_id, max_episode_steps=self._step_limit(), **self.kwargs)
            return TextEnvironment(env, self.describe(env))
        except Exception as error:
            raise UnusableEnvironment(f"{self.env_id}: {str(error) or type(error).__name__}") from error

    def _step_limit(self) -> int | None:
        """The limit to pass to Gymnasium. None keeps the environment's own limit."""
        if self.max_episode_steps is not None:
            return self.max_episode_steps
        if module := self.env_id.rpartition(":")[0]:
            import_module(module)
        return None if gymnasium.spec(self.name).max_episode_steps else STEP_CAP


def load_description(named: str) -> Describe:
    """The class or function that `named`, "module:Class", refers to. Raises UnusableEnvironment if there is none."""
    module, _, name = named.partition(":")
    if not module or not name:
        raise UnusableEnvironment(f"{named!r} names no description: use module:Class")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except Exception as error:
        raise UnusableEnvironment(f"{named}: {str(error) or type(error).__name__}") from error
    return found


def search_working_folder() -> None:
    """Lets modules of the working folder be imported. Installed modules take precedence."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def added(episode_return: float, reward: Any) -> tuple[float, float]:
    """The reward as a float, and its sum with the return so far. Raises RewardNotFinite."""
    try:
        number = float(np.asarray(reward, dtype=float).item())  # a number, or an array with one element
    except (TypeError, ValueError, OverflowError):
        number = nan
    if not isfinite(number):
        raise RewardNotFinite(f"the environment returned {reward!s:.100} as a reward; rewards must be finite numbers")
    if not isfinite(episode_return + number):
        raise RewardNotFinite("the sum of the environment's rewards is not a finite number")
    return number, episode_return + number
