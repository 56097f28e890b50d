"""Environments in text: registers the package's own with Gymnasium and finds the description of any environment."""

from collections.abc import Callable
from typing import Any, cast

from gymnasium.core import Env
from gymnasium.envs.registration import parse_env_id, registry
from gymnasium.envs.registration import register as register_with_gymnasium

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
    """Registers the package's environments with Gymnasium, whose plugin entry point calls this; again is a no-op."""
    if FROZEN_LAKE_RANDOM not in registry:
        register_with_gymnasium(
            id=FROZEN_LAKE_RANDOM,
            entry_point="service.environments.frozen_lake:FrozenLakeRandom",
            max_episode_steps=100,
        )


def describe(env: Env[Any, Any]) -> TextDescription:
    """The description of `env`: its own `text_description`, else one written for its id, else one from its spaces.

    Raises ValueError when the environment has a space that text cannot carry.
    """
    own = getattr(env.unwrapped, "text_description", None)
    if own is not None:
        return cast(TextDescription, own(env) if _is_describe(own) else own)
    if env.spec is None:
        return GenericText(env)
    namespace, name, _version = parse_env_id(env.spec.id)
    return _DESCRIPTIONS.get((namespace, name), GenericText)(env)


def _is_describe(own: object) -> bool:
    return isinstance(own, type) or (isinstance(own, Callable) and not hasattr(own, "action_space"))


register()
