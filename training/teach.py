"""Lets a policy learn from a teacher alone: `python -m training.teach corrections`, or `ratings`.

The game is slippery FrozenLake. The teacher is a program that stands in for a human: it knows the best move in each
state. With `corrections` it replaces some of the policy's actions by its own (recorded actions, method bc). With
`ratings` it only says afterwards how good an episode was, from 1 to 5 (method dpo). No reward is used.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

import gymnasium
import numpy as np
import typer
from rich.progress import track

from service.client import Client, Episode
from service.environments import describe
from training.learn import service

ENV = "FrozenLake-v1"
TEST_SEED = 2_000_000_000

Lesson = Literal["corrections", "ratings"]

EPISODES: dict[Lesson, int] = {"corrections": 50, "ratings": 512}
"""The number of episodes that the teacher corrects or rates."""

TRAIN: dict[Lesson, tuple[str, ...]] = {
    "corrections": ("--method", "bc", "--keep", "recorded", "--learning-rate", "2e-3", "--epochs", "12"),
    "ratings": ("--method", "dpo", "--score", "rating", "--learning-rate", "1e-3", "--epochs", "1"),
}
"""The options of `episodic train`."""


def best_moves(env: Any, discount: float = 0.99) -> list[int]:
    """The best action in each state of slippery FrozenLake, by value iteration on its table."""
    table: dict[int, dict[int, Any]] = env.unwrapped.P
    values, moves = np.zeros(len(table)), [0] * len(table)
    for _ in range(1000):
        for state, actions in table.items():
            q = [sum(p * (r + discount * (not end) * values[to]) for p, to, r, end in a) for a in actions.values()]
            values[state], moves[state] = max(q), int(np.argmax(q))
    return moves


Choose = Callable[[Episode, str, int], Any]
"""Lets the policy act, or records an action, for an observation (as text, and the state). Returns the action."""


def play(client: Client, env: Any, seed: int, choose: Choose, tag: str, **options: Any) -> tuple[Episode, int, bool]:
    """Plays an episode. Returns it with its number of steps, and whether the goal was reached."""
    text = describe(env)
    state, info = env.reset(seed=seed)
    metadata = {"env": ENV, "seed": seed}
    episode = client.episode(
        action_space=text.action_space, instructions=text.instructions, tags=[tag], metadata=metadata, **options
    )
    steps, over, reward = 0, False, 0.0
    while not over:
        action = choose(episode, text.observation(state, info), int(state))
        state, reward, terminated, truncated, info = env.step(text.action(action))
        steps, over = steps + 1, terminated or truncated
    episode.end(terminated=terminated, truncated=truncated)
    return episode, steps, reward > 0


def correct(client: Client, tag: str, num_episodes: int) -> None:
    """The teacher chooses about half of the actions; the policy chooses the others."""
    env = gymnasium.make(ENV)
    best, actions, rng = best_moves(env), describe(env).action_space["actions"], np.random.default_rng(0)

    def choose(episode: Episode, observation: str, state: int) -> Any:
        if rng.random() < 0.5:
            return episode.record(actions[best[state]], observation).action
        return episode.act(observation).action

    for seed in track(range(num_episodes), "corrected episodes"):
        play(client, env, seed, choose, tag)


def rate(client: Client, tag: str, num_episodes: int, plays: int = 8) -> None:
    """The policy plays each seed several times. The teacher rates each episode by how far it came."""
    env = gymnasium.make(ENV)
    for number in track(range(num_episodes), "rated episodes"):
        seed = number // plays
        episode, steps, reached = play(
            client,
            env,
            seed,
            lambda episode, observation, state: episode.act(observation).action,
            tag,
            group=f"{tag}-{seed}",
            sampling={"temperature": 8},
        )
        episode.feedback(5 if reached else 1 + min(3, steps // 6))


TEACH: dict[Lesson, Callable[[Client, str, int], None]] = {"corrections": correct, "ratings": rate}


def main(
    lesson: Annotated[Lesson, typer.Argument(help="What the policy learns from.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the adapter. [default: learned-LESSON]")] = None,
    tests: Annotated[int, typer.Option(min=10, help="Number of seeds in the test.")] = 500,
) -> None:
    """Let the teacher teach, train on what it said, and compare both policies on other seeds."""
    folder = out or Path(f"learned-{lesson}")
    folder.mkdir(parents=True, exist_ok=True)
    with service(folder) as url, Client(url) as client:
        name, tag = lesson, f"{lesson}-{uuid4().hex[:8]}"
        TEACH[lesson](client, tag, EPISODES[lesson])
        adapter = folder / f"adapter-{tag}"
        run("train", "--from", url, "--tag", tag, "--out", str(adapter), *TRAIN[lesson])
        client.upload_policy(name, adapter)
        run(
            *("rollout", "--url", url, "--env", ENV, "--episodes", str(tests), "--seed", str(TEST_SEED)),
            *("--temperature", "0", "--policies", f"base,{name}", "--concurrency", "64"),
        )


def run(*arguments: str) -> None:
    """Runs an `episodic` command, and ends with its exit code if it fails."""
    code = subprocess.run([sys.executable, "-m", "service", *arguments], check=False).returncode  # noqa: S603
    if code:
        raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
