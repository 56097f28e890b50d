"""The tables used in training agree with the real environments and contain no held-out map."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, is_valid

from service.environments import describe
from service.environments.frozen_lake import is_held_out
from training import worlds
from training.worlds import World


def rows_of(world: World, index: int) -> list[str]:
    return [line.partition(": ")[2].replace(" ", "") for line in world.first[index].strip().split("\n")]


def test_training_holds_every_solvable_map_but_those_held_out():
    train = {"/".join(rows_of(worlds.frozen_lake(), index)) for index in range(len(worlds.frozen_lake().first))}
    held_out = {
        "/".join(rows_of(worlds.frozen_lake(True), index)) for index in range(len(worlds.frozen_lake(True).first))
    }
    solvable = {"/".join(rows) for rows in worlds.lake_maps() if is_valid([list(row) for row in rows], 4)}
    assert train | held_out == solvable
    assert not any(is_held_out(text.split("/")) for text in train)
    assert all(is_held_out(text.split("/")) for text in held_out)


def test_frozen_lake_moves_as_gymnasium_does():
    world = worlds.frozen_lake()
    for index in range(0, len(world.first), 250):
        table: Any = FrozenLakeEnv(desc=rows_of(world, index), is_slippery=False).P
        for state in range(15):
            if rows_of(world, index)[state // 4][state % 4] == "H":
                continue
            for action in range(4):
                ((_, after, _, over),) = table[state][action]
                assert (world.outcomes[index, state, action, 0], world.ends[index, state, action, 0]) == (after, over)


@pytest.mark.parametrize("world", [worlds.cliff_walking(), worlds.taxi()], ids=lambda world: world.name)
def test_tables_move_as_gymnasium_does(world: World):
    env: Any = gymnasium.make({"cliff_walking": "CliffWalking-v1", "taxi": "Taxi-v4"}[world.name]).unwrapped
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(300):
        state, action = int(rng.choice(np.flatnonzero(world.starts[0]))), int(rng.integers(len(world.actions)))
        env.s = state
        after, _, over, _, _ = env.step(action)
        assert (world.outcomes[0, state, action, 0], world.ends[0, state, action, 0]) == (after, over)


def test_blackjack_hits_as_gymnasium_does():
    world = worlds.blackjack()
    hands = worlds.blackjack_hands()
    env = gymnasium.make("Blackjack-v1")
    for seed in range(300):
        (player, dealer, ace), _ = env.reset(seed=seed)
        state = hands.index((player, dealer, bool(ace)))
        (player, dealer, ace), _, over, _, _ = env.step(1)
        possible = {
            None if end else hands[after]
            for after, end in zip(world.outcomes[0, state, 1], world.ends[0, state, 1], strict=True)
        }
        assert (None if over else (player, dealer, bool(ace))) in possible


def test_states_are_the_descriptions_texts():
    for env_id, world in (("CliffWalking-v1", worlds.cliff_walking()), ("Taxi-v4", worlds.taxi())):
        env = gymnasium.make(env_id)
        description = describe(env)
        assert [description.observation(state, {}) for state in range(env.observation_space.n)] == list(world.states)
        assert description.instructions == world.instructions
    blackjack = describe(gymnasium.make("Blackjack-v1"))
    assert [blackjack.observation(hand, {}) for hand in worlds.blackjack_hands()] == list(worlds.blackjack().states)


def play_expert(env: gymnasium.Env[Any, Any], world: World, which: int, state: int) -> tuple[float, int]:
    total, num_steps, over = 0.0, 0, False
    while not over and num_steps < 100:
        state, reward, over, _, _ = env.step(int(world.expert[which, state].argmax()))
        total, num_steps = total + float(reward), num_steps + 1
    return total, num_steps


def test_the_expert_crosses_every_tenth_map():
    world = worlds.frozen_lake()
    for index in range(0, len(world.first), 10):
        env = FrozenLakeEnv(desc=rows_of(world, index), is_slippery=False)
        state, _ = env.reset(seed=0)
        total, num_steps = play_expert(env, world, index, state)
        assert total == 1
        assert num_steps <= 12


def test_the_expert_walks_along_the_cliff_for_minus_13():
    env = gymnasium.make("CliffWalking-v1")
    state, _ = env.reset(seed=0)
    assert play_expert(env, worlds.cliff_walking(), 0, state) == (-13, 13)


def test_the_expert_delivers_without_a_fault():
    env = gymnasium.make("Taxi-v4")
    for seed in range(30):
        state, _ = env.reset(seed=seed)
        total, num_steps = play_expert(env, worlds.taxi(), 0, state)
        assert total == 21 - num_steps


@pytest.mark.parametrize(
    ("hand", "best"),
    [  # Sutton and Barto (2018), figure 5.2
        ((16, 10, False), "hit"),
        ((17, 10, False), "stick"),
        ((12, 3, False), "hit"),
        ((12, 4, False), "stick"),
        ((18, 9, True), "hit"),
        ((18, 8, True), "stick"),
        ((17, 6, True), "hit"),
    ],
)
def test_the_blackjack_expert_plays_basic_strategy(hand: worlds.Hand, best: str):
    world = worlds.blackjack()
    assert world.actions[world.expert[0, worlds.blackjack_hands().index(hand)].argmax()] == best
