"""Classic control in text: each number has its meaning, actions do what they say, and success is the documented one."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation, RescaleAction, TimeLimit, TransformAction, TransformObservation

from service.environments import describe
from service.environments.generic import GenericText

IDS = ["CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Acrobot-v1", "Pendulum-v1"]


@pytest.mark.parametrize("env_id", IDS)
def test_an_observation_names_each_number_and_each_action_is_legal(env_id: str):
    env: Any = gymnasium.make(env_id)
    description = describe(env)
    assert not isinstance(description, GenericText)
    observation, info = env.reset(seed=0)
    text = description.observation(observation, info)
    assert len(text.split(", ")) == len(observation)
    for part, number in zip(text.split(", "), observation, strict=True):
        assert float(part.rsplit(" ", 1)[1]) == pytest.approx(float(number), abs=1e-3)
    for action in description.action_space["actions"]:
        assert action in description.instructions
        assert env.action_space.contains(description.action(action))


@pytest.mark.parametrize(
    ("env_id", "action", "index", "sign"),
    [
        ("CartPole-v1", "left", 1, -1),
        ("CartPole-v1", "right", 1, 1),
        ("MountainCar-v0", "left", 1, -1),
        ("MountainCar-v0", "right", 1, 1),
        ("MountainCarContinuous-v0", "right", 1, 1),
        ("Acrobot-v1", "negative", 5, -1),
        ("Acrobot-v1", "positive", 5, 1),
        ("Pendulum-v1", "-2", 2, -1),
        ("Pendulum-v1", "2", 2, 1),
    ],
)
def test_an_action_does_what_it_says(env_id: str, action: str, index: int, sign: int):
    """The number changes in this direction, compared with the action in the middle (for CartPole: the other one)."""

    def after(act: str) -> float:
        env: Any = gymnasium.make(env_id)
        env.reset(seed=3)
        observation, *_ = env.step(describe(env).action(act))
        return float(observation[index])

    actions = describe(gymnasium.make(env_id)).action_space["actions"]
    other = actions[len(actions) // 2] if len(actions) > 2 else next(one for one in actions if one != action)
    assert (after(action) - after(other)) * sign > 0


def test_an_environment_that_a_wrapper_changes_is_described_by_its_spaces():
    env: Any = gymnasium.make("CartPole-v1")
    assert not isinstance(describe(TimeLimit(env, 5)), GenericText)
    assert isinstance(describe(FrameStackObservation(env, 2)), GenericText)
    assert isinstance(
        describe(RescaleAction(gymnasium.make("Pendulum-v1"), np.float32(-1), np.float32(1))), GenericText
    )
    assert isinstance(describe(TransformObservation(env, lambda seen: -seen, env.observation_space)), GenericText)
    assert isinstance(describe(TimeLimit(TransformAction(env, lambda a: 1 - a, env.action_space), 5)), GenericText)


@pytest.mark.parametrize(
    ("env_id", "terminated", "success"),
    [
        ("CartPole-v1", True, False),
        ("CartPole-v1", False, True),
        ("MountainCar-v0", True, True),
        ("MountainCar-v0", False, False),
        ("MountainCarContinuous-v0", True, True),
        ("Acrobot-v1", True, True),
        ("Acrobot-v1", False, False),
        ("Pendulum-v1", False, None),
    ],
)
def test_success(env_id: str, terminated: bool, success: bool | None):
    description = describe(gymnasium.make(env_id))
    assert description.success(1.0, terminated, not terminated, -100.0) is success
