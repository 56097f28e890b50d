"""CliffWalking, Taxi and Blackjack in text: texts and actions agree with the environments' numbers."""

import gymnasium
import pytest

from service.environments import describe


def test_cliff_walking_says_where_the_walker_is():
    env = gymnasium.make("CliffWalking-v1")
    description = describe(env)
    observation, info = env.reset(seed=0)
    assert description.observation(observation, info) == "row 3, column 0"
    texts = []
    for action in ("up", "right", "down"):
        observation, reward, *_, info = env.step(description.action(action))
        texts.append((description.observation(observation, info), reward))
    assert texts == [("row 2, column 0", -1), ("row 2, column 1", -1), ("row 3, column 0", -100)]


def test_taxi_says_what_decode_says():
    env = gymnasium.make("Taxi-v4")
    description = describe(env)
    for state in range(0, 500, 7):
        row, column, passenger, destination = env.unwrapped.decode(state)
        place = ("red", "green", "yellow", "blue", "taxi")
        expected = f"row {row}, column {column}, passenger {place[passenger]}, destination {place[destination]}"
        assert description.observation(state, {}) == expected


def test_taxi_actions_move_the_taxi():
    env = gymnasium.make("Taxi-v4")
    description = describe(env)
    for action, (row, column) in {"south": (3, 2), "north": (1, 2), "east": (2, 3), "west": (2, 1)}.items():
        env.reset(seed=0)
        env.unwrapped.s = env.unwrapped.encode(2, 2, 0, 1)
        observation, *_ = env.step(description.action(action))
        assert description.observation(observation, {}).startswith(f"row {row}, column {column},")


def test_blackjack_says_the_hand():
    description = describe(gymnasium.make("Blackjack-v1"))
    assert description.observation((14, 10, 0), {}) == "sum 14, dealer 10, usable ace no"
    assert description.observation((18, 1, 1), {}) == "sum 18, dealer 1, usable ace yes"
    assert [description.action(action) for action in ("stick", "hit")] == [0, 1]


@pytest.mark.parametrize(
    ("env_id", "reward", "terminated", "success"),
    [
        ("CliffWalking-v1", -1, True, True),
        ("CliffWalking-v1", -1, False, False),
        ("Taxi-v4", 20, True, True),
        ("Taxi-v4", -1, False, False),
        ("Blackjack-v1", 1, True, True),
        ("Blackjack-v1", 0, True, False),
        ("Blackjack-v1", -1, True, False),
    ],
)
def test_success(env_id: str, reward: float, terminated: bool, success: bool):
    description = describe(gymnasium.make(env_id))
    assert description.success(reward, terminated, not terminated, reward) is success


@pytest.mark.parametrize("env_id", ["CliffWalking-v1", "Taxi-v4", "Blackjack-v1", "episodic/FrozenLakeRandom-v0"])
def test_instructions_name_every_action(env_id: str):
    env = gymnasium.make(env_id)
    description = describe(env)
    assert len(description.action_space["actions"]) == env.action_space.n
    for number, action in enumerate(description.action_space["actions"]):
        assert action in description.instructions
        assert description.action(action) == number
