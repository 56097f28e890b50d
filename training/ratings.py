"""Lets the packaged policy learn slippery FrozenLake from ratings alone: `python -m training.ratings`.

In each situation, the policy tries several actions in forks of the episode. A rater stands in for a human: it knows how
good each action is and rates it from 1 to 5. DPO learns from the pairs; no reward is used.
"""

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
from training.corrections import ENV, action_values, train_and_compare
from training.learn import running_service

TRAIN = ("--method", "dpo", "--score", "rating", "--beta", "0.3", "--learning-rate", "1e-3", "--epochs", "10")
"""The options of `episodic train`."""

NUM_FORKS = 4
TEMPERATURE = 5.0
"""High enough that the forks of a situation try different actions."""


def rating(values: npt.NDArray[np.float64], action: int) -> int:
    """The rating of an action: 5 for the best one, 1 for the worst one."""
    span = float(values.max() - values.min())
    return 5 if span == 0 else 1 + round(4 * float(values[action] - values.min()) / span)


def play(client: Client, env: Any, values: npt.NDArray[np.float64], seed: int, tag: str) -> None:
    """Plays an episode. Before each step, forks try actions, which are rated."""
    text = describe(env)
    state, info = env.reset(seed=seed)
    space: Any = text.action_space
    episode = client.episode(
        action_space=space,
        instructions=text.instructions,
        tags=[tag],
        metadata={"env": ENV, "seed": seed},
        sampling={"temperature": TEMPERATURE},
    )
    over = False
    while not over:
        observation = text.observation(state, info)
        for fork in episode.fork(NUM_FORKS, group=f"{episode.id}-{episode.step}"):
            tried = fork.act(observation).action
            fork.feedback(rating(values[state], space["actions"].index(tried)))
            fork.end(truncated=True)
        action = episode.act(observation).action
        state, _, terminated, truncated, info = env.step(text.action(action))
        over = terminated or truncated
    episode.end(terminated=terminated, truncated=truncated)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("rated"),
    episodes: Annotated[int, typer.Option(min=1, help="Number of episodes in which actions are rated.")] = 100,
    tests: Annotated[int, typer.Option(min=10, help="Number of seeds in the test.")] = 500,
) -> None:
    """Rate actions in some episodes, train on the ratings, and compare both policies on other seeds."""
    out.mkdir(parents=True, exist_ok=True)
    tag = f"ratings-{uuid4().hex[:8]}"
    env = gymnasium.make(ENV)
    values = action_values(env)
    with running_service(out) as url, Client(url) as client:
        for seed in track(range(episodes), "rated episodes"):
            play(client, env, values, seed, tag)
        train_and_compare(client, url, out / tag, TRAIN, tests)


if __name__ == "__main__":
    typer.run(main)
