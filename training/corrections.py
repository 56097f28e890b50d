"""Lets the packaged policy learn slippery FrozenLake from corrections alone: `python -m training.corrections`.

A teacher stands in for a human. It knows the best move in each state, and chooses about half of the moves of some
episodes (recorded actions). Only these are imitated; no reward is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import gymnasium
import numpy as np
import numpy.typing as npt
import typer
from rich.progress import track

from service.client import Client
from service.environments import describe
from training.learn import episodic, running_service

ENV = "FrozenLake-v1"
TEST_SEED = 2_000_000_000
TRAIN = ("--method", "bc", "--keep", "recorded", "--learning-rate", "2e-3", "--epochs", "12")
"""The options of `episodic train`."""


def action_values(env: Any, discount: float = 0.99) -> npt.NDArray[np.float64]:
    """The value of each action in each state of FrozenLake, by value iteration on its table. (states, actions)"""
    table: dict[int, dict[int, Any]] = env.unwrapped.P
    q = np.zeros((len(table), len(table[0])))
    for _ in range(1000):
        for state, actions in table.items():
            for action, outcomes in actions.items():
                q[state, action] = sum(p * (r + discount * (not end) * q[to].max()) for p, to, r, end in outcomes)
    return q


def best_moves(env: Any) -> list[int]:
    """The best action in each state of FrozenLake."""
    return action_values(env).argmax(axis=1).tolist()


def play(client: Client, env: Any, best: list[int], seed: int, tag: str) -> None:
    """Plays an episode in which policy and teacher take turns at random."""
    text, teacher = describe(env), np.random.default_rng(seed)
    state, info = env.reset(seed=seed)
    metadata = {"env": ENV, "seed": seed}
    space: Any = text.action_space
    episode = client.episode(action_space=space, instructions=text.instructions, tags=[tag], metadata=metadata)
    over = False
    while not over:
        observation = text.observation(state, info)
        if teacher.random() < 0.5:
            action = episode.record(space["actions"][best[state]], observation).action
        else:
            action = episode.act(observation).action
        state, _, terminated, truncated, info = env.step(text.action(action))
        over = terminated or truncated
    episode.end(terminated=terminated, truncated=truncated)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("corrected"),
    episodes: Annotated[int, typer.Option(min=1, help="Number of corrected episodes.")] = 50,
    tests: Annotated[int, typer.Option(min=10, help="Number of seeds in the test.")] = 500,
) -> None:
    """Correct some episodes, train on the corrections, and compare both policies on other seeds."""
    out.mkdir(parents=True, exist_ok=True)
    tag = f"corrections-{uuid4().hex[:8]}"
    env = gymnasium.make(ENV)
    best = best_moves(env)
    with running_service(out) as url, Client(url) as client:
        for seed in track(range(episodes), "corrected episodes"):
            play(client, env, best, seed, tag)
        train_and_compare(client, url, out / tag, TRAIN, tests)


def train_and_compare(client: Client, url: str, adapter: Path, options: Sequence[str], tests: int) -> None:
    """Trains on the episodes whose tag is the folder's name, and compares the result with the base model.

    The name of the policy is that of the folder above.
    """
    tag, name = adapter.name, adapter.resolve().parent.name
    episodic("train", "--from", url, "--tag", tag, "--out", str(adapter), *options)
    client.upload_policy(name, adapter)
    episodic(
        *("rollout", "--url", url, "--env", ENV, "--episodes", str(tests), "--seed", str(TEST_SEED)),
        *("--temperature", "0", "--policies", f"base,{name}", "--concurrency", "64"),
    )


if __name__ == "__main__":
    typer.run(main)
