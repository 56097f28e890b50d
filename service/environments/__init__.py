"""Text descriptions of Gymnasium environments, and the registration of this package's own environments."""

from typing import Any

from gymnasium.core import ActionWrapper, Env, ObservationWrapper, Wrapper
from gymnasium.envs import registration

from service.environments.base import Describe, TextDescription
from service.environments.classic_control import (
    AcrobotText,
    CartPoleText,
    MountainCarContinuousText,
    MountainCarText,
    PendulumText,
)
from service.environments.frozen_lake import FrozenLakeText
from service.environments.generic import GenericText
from service.environments.toy_text import BlackjackText, CliffWalkingText, TaxiText

__all__ = ["Describe", "TextDescription", "describe", "register"]

FROZEN_LAKE_RANDOM = "episodic/FrozenLakeRandom-v0"

# Keys are (namespace, name) without a version: versions of these environments differ in rules, not in spaces.
_DESCRIPTIONS: dict[tuple[str | None, str], Describe] = {
    ("episodic", "FrozenLakeRandom"): FrozenLakeText,
    (None, "FrozenLake"): FrozenLakeText,
    (None, "FrozenLake8x8"): FrozenLakeText,
    (None, "CliffWalking"): CliffWalkingText,
    (None, "CliffWalkingSlippery"): CliffWalkingText,
    (None, "Taxi"): TaxiText,
    (None, "Blackjack"): BlackjackText,
    (None, "CartPole"): CartPoleText,
    (None, "MountainCar"): MountainCarText,
    (None, "MountainCarContinuous"): MountainCarContinuousText,
    (None, "Acrobot"): AcrobotText,
    (None, "Pendulum"): PendulumText,
}


def register() -> None:
    """Registers the package's environments with Gymnasium. Calling it again does nothing.

    Importing this package calls it. Gymnasium 1 does not load plugins automatically, but it imports the module named
    before a colon: `gymnasium.make("service.environments:episodic/FrozenLakeRandom-v0")`.
    """
    if FROZEN_LAKE_RANDOM not in registration.registry:
        registration.register(  # pyright: ignore[reportUnknownMemberType]: Gymnasium leaves kwargs open
            id=FROZEN_LAKE_RANDOM,
            entry_point="service.environments.frozen_lake:FrozenLakeRandom",
            max_episode_steps=100,
        )


def describe(env: Env[Any, Any]) -> TextDescription:
    """Returns the text description of an environment.

    It is the first that exists of: the environment's own `text_description`, a description written for its id (unless
    wrappers change its spaces, observations or actions), and a generic description made from its spaces. Raises
    ValueError if a space is not supported.
    """
    own: Any = getattr(env.unwrapped, "text_description", None)
    if own is not None:
        return own if isinstance(getattr(own, "action_space", None), dict) and not isinstance(own, type) else own(env)
    if env.spec is None or not _is_unchanged(env):
        return GenericText(env)
    namespace, name, _version = registration.parse_env_id(env.spec.id)
    return _DESCRIPTIONS.get((namespace, name), GenericText)(env)


def _is_unchanged(env: Env[Any, Any]) -> bool:
    """Whether no wrapper changes what the environment's observations and actions mean."""
    inner, outer = env.unwrapped, env
    while isinstance(outer, Wrapper):
        if isinstance(outer, ObservationWrapper | ActionWrapper):
            return False
        outer = outer.env
    return bool(env.observation_space == inner.observation_space and env.action_space == inner.action_space)


register()
