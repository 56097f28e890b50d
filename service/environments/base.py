"""The interface between a Gymnasium environment and an episode in text: instructions, actions, observations."""

from typing import Any, Protocol

from gymnasium.core import Env

JsonObject = dict[str, Any]


class TextDescription(Protocol):
    """Translates between one environment instance and a policy that reads and writes text, in all of its episodes."""

    instructions: str
    """The system prompt of each episode: the task and the available actions."""

    action_space: JsonObject
    """The `action_space` of POST /episode, for example {"type": "discrete", "actions": [...]}."""

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        """The text of an observation that `reset` or `step` returned. Called once for each observation, in order."""
        ...

    def action(self, action: Any) -> Any:
        """The environment's action for the `action` in the response of POST /act (a string or a JSON value).

        Raises ValueError if it is no action of the environment. The rollout then ends the episode.
        """
        ...

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool | None:
        """Whether an episode that ended this way completed its task. `reward` is the last reward.

        None if the description does not define it. The environment's `info` may define it then.
        """
        ...


class Describe(Protocol):
    """Creates the description of a new environment instance."""

    def __call__(self, env: Env[Any, Any]) -> TextDescription: ...


def discrete(actions: tuple[str, ...]) -> JsonObject:
    """The discrete action space with these actions."""
    return {"type": "discrete", "actions": list(actions)}
