"""FrozenLakeRandom: maps depend on the seed and are solvable, the train/held-out split is fixed, texts are right."""

import subprocess
import sys
from typing import Any

import gymnasium
import pytest
from gymnasium.envs.toy_text.frozen_lake import is_valid

from service.environments import describe, register
from service.environments.frozen_lake import FrozenLakeRandom, best_completion, is_held_out

ENV_ID = "episodic/FrozenLakeRandom-v0"


def rows(env: gymnasium.Env[Any, Any]) -> list[str]:
    return [bytes(row).decode() for row in env.unwrapped.desc]


def drawn(maps: str, num: int = 60, **kwargs: Any) -> list[str]:
    env = gymnasium.make(ENV_ID, maps=maps, **kwargs)
    env.reset(seed=3)
    found = []
    for _ in range(num):
        env.reset()
        found.append("/".join(rows(env)))
    return found


def test_registering_again_is_a_no_op():
    register()
    assert gymnasium.spec(ENV_ID).max_episode_steps == 100


@pytest.mark.parametrize("size", [3, 4, 8])
def test_maps_are_solvable_and_of_the_size_asked_for(size: int):
    for text in drawn("all", 20, size=size, p=0.6):
        board = [list(row) for row in text.split("/")]
        assert len(board) == size
        assert {len(row) for row in board} == {size}
        assert is_valid(board, size)


def test_the_seed_decides_the_map():
    env = gymnasium.make(ENV_ID)
    by_seed = {}
    for seed in range(20):
        env.reset(seed=seed)
        by_seed[seed] = rows(env)
    env.reset(seed=7)
    assert rows(env) == by_seed[7]
    assert len({"/".join(value) for value in by_seed.values()}) > 10


def test_a_reset_without_a_seed_makes_another_map():
    assert len(set(drawn("all"))) > 30


def test_the_split_is_disjoint_and_both_sides_are_drawn_from():
    train, held_out = set(drawn("train")), set(drawn("held_out"))
    assert train.isdisjoint(held_out)
    assert all(is_held_out(text.split("/")) for text in held_out)
    assert not any(is_held_out(text.split("/")) for text in train)


def test_the_split_never_moves():
    # If the split changed, maps that the packaged policy was trained on would appear in its evaluation.
    assert is_held_out(["SFFF", "FHFH", "FFFH", "HFFG"])
    assert not is_held_out(["SFFF", "FFFF", "FFFF", "FFFG"])


@pytest.mark.parametrize(
    "kwargs", [{"size": 2}, {"size": 17}, {"p": 0.4}, {"p": 1.0}, {"maps": "test"}, {"render_mode": "human"}]
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        FrozenLakeRandom(**kwargs)


def test_moves_are_those_of_frozen_lake_and_not_slippery():
    env = gymnasium.make(ENV_ID, p=0.99)
    env.reset(seed=0)
    assert rows(env) == ["SFFF", "FFFF", "FFFF", "FFFG"]
    states = [env.step(action)[:3] for action in (2, 2, 2, 1, 1, 1)]
    assert [state for state, _, _ in states] == [1, 2, 3, 7, 11, 15]
    assert states[-1] == (15, 1, True)


@pytest.mark.parametrize("env_id", [ENV_ID, "FrozenLake-v1", "FrozenLake8x8-v1"])
def test_the_map_is_in_the_first_observation_of_every_episode_and_in_no_other(env_id: str):
    env = gymnasium.make(env_id)
    description = describe(env)
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        first = description.observation(observation, info)
        lines = first.split("\n")
        assert [line.partition(": ")[2].replace(" ", "") for line in lines[:-1]] == rows(env)
        assert lines[-1] == "row 0, column 0"
        observation, *_, info = env.step(0)
        assert description.observation(observation, info).count("\n") == 0


def test_actions_in_text_are_gymnasium_s_numbers():
    env = gymnasium.make("FrozenLake-v1", is_slippery=False)
    description = describe(env)
    observation, info = env.reset(seed=0)
    for action, expected in (("right", "row 0, column 1"), ("left", "row 0, column 0"), ("down", "row 1, column 0")):
        observation, *_, info = env.step(description.action(action))
        assert description.observation(observation, info) == expected
    observation, *_, info = env.step(description.action("up"))
    assert description.observation(observation, info) == "row 0, column 0"


def test_success_is_reaching_the_goal():
    description = describe(gymnasium.make(ENV_ID))
    assert description.success(1.0, True, False, 1.0)
    assert not description.success(0.0, True, False, 0.0)
    assert not description.success(0.0, False, True, 0.0)


def test_gymnasium_finds_the_environment_by_module_and_id():
    code = f"import gymnasium; print(gymnasium.make('service.environments:{ENV_ID}').spec.id)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ENV_ID


@pytest.mark.parametrize(("env", "percent"), [("FrozenLake-v1", "74%"), ("FrozenLake8x8-v1", "91%")])
def test_note_on_slippery_ice_says_what_the_best_policy_reaches(env: str, percent: str):
    note = describe(gymnasium.make(env)).note  # pyright: ignore[reportAttributeAccessIssue]
    assert "is_slippery" in note
    assert f"in {percent} of episodes" in note


@pytest.mark.parametrize(
    ("env", "kwargs"), [("FrozenLake-v1", {"is_slippery": False}), ("episodic/FrozenLakeRandom-v0", {})]
)
def test_note_is_none_without_slipping(env: str, kwargs: dict[str, Any]):
    assert describe(gymnasium.make(env, **kwargs)).note is None  # pyright: ignore[reportAttributeAccessIssue]


def test_best_completion_is_one_if_the_goal_can_be_reached_in_time():
    moves = gymnasium.make("FrozenLake-v1", is_slippery=False).unwrapped.P  # pyright: ignore[reportAttributeAccessIssue]
    assert [best_completion(moves, steps) for steps in (5, 6)] == [0.0, 1.0]
