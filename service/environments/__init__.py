"""Environments in text: registers the package's own with Gymnasium and finds the description of any environment."""

from typing import Any

from gymnasium.core import Env
from gymnasium.envs import registration

from service.environments.base import Describe, TextDescription
from service.environments.frozen_lake import FrozenLakeText
from service.environments.generic import GenericText
from service.environments.toy_text import BlackjackText, CliffWalkingText, TaxiText

__all__ = ["Describe", "TextDescription", "describe", "register"]

FROZEN_LAKE_RANDOM = "episodic/FrozenLakeRandom-v0"

# By name without version: the versions of one of these differ in rules, not in spaces.
_DESCRIPTIONS: dict[tuple[str | None, str], Describe] = {
    ("episodic", "FrozenLakeRandom"): FrozenLakeText,
    (None, "FrozenLake"): FrozenLakeText,
    (None, "FrozenLake8x8"): FrozenLakeText,
    (None, "CliffWalking"): CliffWalkingText,
    (None, "CliffWalkingSlippery"): CliffWalkingText,
    (None, "Taxi"): TaxiText,
    (None, "Blackjack"): BlackjackText,
}


def register() -> None:
    """Registers the package's environments with Gymnasium; again is a no-op.

    Importing this package does it. Gymnasium 1 loads no plugins by itself, but imports what stands before a colon:
    `gymnasium.make("service.environments:episodic/FrozenLakeRandom-v0")`.
    """
    if FROZEN_LAKE_RANDOM not in registration.registry:
        registration.register(  # pyright: ignore[reportUnknownMemberType]: Gymnasium leaves kwargs open
            id=FROZEN_LAKE_RANDOM,
            entry_point="service.environments.frozen_lake:FrozenLakeRandom",
            max_episode_steps=100,
        )


def describe(env: Env[Any, Any]) -> TextDescription:
    """The description of `env`: its own `text_description`, else one written for its id, else one from its spaces.

    Raises ValueError when the environment has a space that text cannot carry.
    """
    own: Any = getattr(env.unwrapped, "text_description", None)
    if own is not None:
        return own if isinstance(getattr(own, "action_space", None), dict) and not isinstance(own, type) else own(env)
    if env.spec is None:
        return GenericText(env)
    namespace, name, _version = registration.parse_env_id(env.spec.id)
    return _DESCRIPTIONS.get((namespace, name), GenericText)(env)


register()
