"""FrozenLake in text, and FrozenLakeRandom, which has a new solvable map in each episode.

The policy sees the map only in the first observation and must remember it.
"""

import hashlib
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.core import Env
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

from service.environments.base import JsonObject, discrete

Maps = Literal["all", "train", "held_out"]
Grid = npt.NDArray[np.bytes_]
Moves = dict[int, dict[int, list[tuple[float, int, float, bool]]]]

HELD_OUT_PERCENT = 20


def is_held_out(rows: list[str]) -> bool:
    """Whether a map belongs to the 20% that are never used in training. The result never changes for a given map."""
    digest = hashlib.sha256("/".join(rows).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


class FrozenLakeRandom(Env[np.int64, np.int64]):
    """FrozenLake, not slippery, on a new random solvable map after each reset. `reset(seed=...)` determines the map.

    `size` is the side of the square map, and `p` the probability that a tile is frozen rather than a hole. `maps` is
    the set of maps to draw from: "all", "train" or "held_out". Observations, actions and rewards are FrozenLake's.
    Raises ValueError if an argument is out of range.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it this way)

    def __init__(self, size: int = 4, p: float = 0.8, maps: Maps = "all", render_mode: None = None) -> None:
        if not 3 <= size <= 16:
            raise ValueError(f"size must be from 3 to 16, not {size}")
        # Maps are drawn until one fits. Outside these bounds, fitting maps can be too rare to ever draw one.
        if not 0.5 <= p <= 0.99:
            raise ValueError(f"p must be from 0.5 to 0.99, not {p}")
        if maps not in get_args(Maps):
            raise ValueError(f"maps must be one of {', '.join(get_args(Maps))}, not {maps!r}")
        if render_mode is not None:
            raise ValueError("FrozenLakeRandom has no rendering: render_mode must be None")
        self.size, self.p, self.maps = size, p, maps
        self.render_mode = None
        self.observation_space = spaces.Discrete(size * size)
        self.action_space = spaces.Discrete(4)
        self._lake: Any = FrozenLakeEnv(desc=["S" + "F" * (size - 2) + "G"], is_slippery=False)

    @property
    def desc(self) -> Grid:
        """This episode's map: single bytes S, F, H, G, shape (size, size)."""
        return self._lake.desc

    @property
    def lastaction(self) -> int | None:
        """The last action, or None directly after a reset."""
        return self._lake.lastaction

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._lake = FrozenLakeEnv(desc=self._draw_map(), is_slippery=False)
        return self._lake.reset()

    def step(self, action: np.int64 | int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._lake.step(action)

    def _draw_map(self) -> list[str]:
        rng: Any = self.np_random
        while True:
            rows = generate_random_map(self.size, self.p, seed=int(rng.integers(2**31)))
            if self.maps == "all" or is_held_out(rows) == (self.maps == "held_out"):
                return rows


def best_completion(moves: Moves, max_steps: int) -> float:
    """The probability that an optimal policy reaches the goal from state 0, by value iteration.

    `moves[state][action]` lists (probability, next state, reward, terminated), as Gymnasium's `P` does.
    """
    values = [0.0] * len(moves)
    for _ in range(max_steps):
        values = [
            max(sum(p * (reward + (not end) * values[to]) for p, to, reward, end in results) for results in m.values())
            for _, m in sorted(moves.items())
        ]
    return values[0]


class FrozenLakeText:
    """FrozenLake in text. The first observation of an episode has the map and the position, later ones the position."""

    ACTIONS = ("left", "down", "right", "up")

    instructions: str = "Walk from S to G over F. H is a hole. Actions: left, down, right, up."
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        self._lake: Any = env.unwrapped
        self._max_steps = env.spec.max_episode_steps if env.spec else None

    @property
    def note(self) -> str | None:
        """Says what a good completion rate is on slippery ice, where no policy always reaches the goal."""
        moves: Moves = getattr(self._lake, "P", {})  # FrozenLakeRandom has none: it is not slippery
        if self._max_steps is None or all(len(results) == 1 for m in moves.values() for results in m.values()):
            return None
        best = f"{best_completion(moves, self._max_steps):.0%} of episodes of {self._max_steps} steps"
        return (
            f"Slippery ice: a move may go sideways instead. The best possible policy reaches the goal in {best}. "
            "Without slipping: --env-kwargs '{\"is_slippery\": false}'"
        )

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        where = self.position(int(observation), self._lake.desc.shape[1])
        if self._lake.lastaction is not None:
            return where
        return f"{self.map([bytes(row).decode() for row in self._lake.desc])}\n{where}"

    def action(self, action: Any) -> Any:
        return self.ACTIONS.index(action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether the goal was reached. Only the goal has a reward."""
        return terminated and reward > 0

    @staticmethod
    def map(rows: list[str]) -> str:
        """The map as text with numbered rows, for example "0: S F F H"."""
        return "\n".join(f"{number}: {' '.join(row)}" for number, row in enumerate(rows))

    @staticmethod
    def position(state: int, num_columns: int) -> str:
        return f"row {state // num_columns}, column {state % num_columns}"
