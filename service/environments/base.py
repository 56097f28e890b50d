"""Owns the contract between a Gymnasium environment and an episode in text: instructions, actions, observations."""

from typing import Any, Protocol

from gymnasium.core import Env

JsonObject = dict[str, Any]


class TextDescription(Protocol):
    """How one environment instance speaks to a policy that reads and writes text, over all of its episodes."""

    instructions: str
    """The episode's system prompt: what the task is and which actions there are."""

    action_space: JsonObject
    """The `action_space` of POST /episode, for example {"type": "discrete", "actions": [...]}."""

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        """The text for what `reset` or `step` returned. Called once for each observation, in order."""
        ...

    def action(self, action: Any) -> Any:
        """The environment's action for what POST /act answered (a string, or a JSON value)."""
        ...

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether an episode that ended with this last reward completed its task."""
        ...


class Describe(Protocol):
    """Makes the description of an environment instance that was just built."""

    def __call__(self, env: Env[Any, Any]) -> TextDescription: ...


def discrete(actions: tuple[str, ...]) -> JsonObject:
    """The action space of named actions."""
    return {"type": "discrete", "actions": list(actions)}
