"""Text descriptions of Gymnasium's classic-control environments, with the meaning of each number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.core import Env

from service.environments.base import JsonObject, discrete


def _named(names: Sequence[str], values: Any) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))


class CartPoleText:
    """CartPole in text. The task is completed if the pole still stands when the time limit truncates the episode."""

    NUMBERS = ("cart position", "cart velocity", "pole angle", "pole angular velocity")
    ACTIONS = ("left", "right")

    instructions: str = (
        "Keep the pole on the cart upright for as long as possible. The episode ends when the cart position leaves "
        "-2.4 to 2.4, or the pole angle leaves -0.209 to 0.209 radians; a positive angle leans to the right. "
        "An action pushes the cart. Actions: left, right."
    )
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        del env  # the observation contains everything that the text needs

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        return _named(self.NUMBERS, observation)

    def action(self, action: Any) -> Any:
        return self.ACTIONS.index(action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether the pole stood until the time limit. A fall terminates the episode."""
        return truncated and not terminated


class MountainCarText:
    """MountainCar in text."""

    NUMBERS = ("position", "velocity")
    ACTIONS = ("left", "coast", "right")

    instructions: str = (
        "Drive the car out of the valley to position 0.5 on the right hill. The valley is at position -0.5. The engine "
        "is too weak to climb the hill directly: swing back and forth to gain speed. A positive velocity goes to the "
        "right. An action accelerates the car to the left or to the right, or lets it coast. "
        "Actions: left, coast, right."
    )
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        del env  # the observation contains everything that the text needs

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in zip(self.NUMBERS, observation, strict=True))

    def action(self, action: Any) -> Any:
        return self.ACTIONS.index(action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether the car reached the top. Nothing else terminates an episode."""
        return terminated


class MountainCarContinuousText(MountainCarText):
    """MountainCarContinuous in text. Its action is a force; the text offers three of them: -1, 0 and 1."""

    instructions: str = MountainCarText.instructions.replace("position 0.5 on", "position 0.45 on")

    def action(self, action: Any) -> Any:
        return np.array([self.ACTIONS.index(action) - 1], dtype=np.float32)


class AcrobotText:
    """Acrobot in text."""

    NUMBERS = (
        "cosine of angle 1",
        "sine of angle 1",
        "cosine of angle 2",
        "sine of angle 2",
        "angular velocity 1",
        "angular velocity 2",
    )
    ACTIONS = ("negative", "none", "positive")

    instructions: str = (
        "Two links hang from a fixed point, joined to each other. Swing the free end of the lower link above the line "
        "one link length over the fixed point. Angle 1 is that of the upper link; it is 0 when the link hangs down. "
        "Angle 2 is that of the lower link relative to the upper one. An action is the torque on the joint between "
        "the links. Actions: negative, none, positive."
    )
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        del env  # the observation contains everything that the text needs

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        return _named(self.NUMBERS, observation)

    def action(self, action: Any) -> Any:
        return self.ACTIONS.index(action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether the free end rose above the line. Nothing else terminates an episode."""
        return terminated


class PendulumText:
    """Pendulum in text. Its action is a torque from -2 to 2; the text offers the five whole numbers."""

    NUMBERS = ("x", "y", "angular velocity")
    ACTIONS = ("-2", "-1", "0", "1", "2")

    instructions: str = (
        "Swing the pendulum up and keep it upright. x is the cosine of its angle and y the sine: upright is x 1, y 0; "
        "hanging down is x -1, y 0. The reward is highest when it stands upright without moving. An action is the "
        "torque; a positive torque turns counterclockwise. Actions: -2, -1, 0, 1, 2."
    )
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        del env  # the observation contains everything that the text needs

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        return _named(self.NUMBERS, observation)

    def action(self, action: Any) -> Any:
        return np.array([float(action)], dtype=np.float32)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool | None:
        """None: Gymnasium defines no goal, only rewards."""
        return None
