"""What every contender has to play: the grid of cells, the action spaces, and the observations of an episode."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

INSTRUCTIONS = "Walk from S to G over F. H is a hole. Actions: left, down, right, up."

_MOVES = {
    "left": "row 2, column 2 to row 2, column 1",
    "down": "row 1, column 3 to row 2, column 3",
    "right": "row 0, column 1 to row 0, column 2",
    "up": "row 3, column 2 to row 2, column 2",
    "north": "row 4, column 0 to row 3, column 0",
    "south": "row 0, column 4 to row 1, column 4",
    "east": "row 1, column 1 to row 1, column 2",
    "west": "row 3, column 4 to row 3, column 3",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The kind of actions: one of `actions`, or free text if there are none. All contenders use the same `sampling`."""

    name: str
    title: str
    actions: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])


CHOICE1 = Workload("choice1", "actions of 1 token", ("left", "down", "right", "up"), sampling={"temperature": 0.0})
CHOICE12 = Workload(
    "choice12",
    "actions of 12 tokens",
    tuple(f"{move} from {way}." for move, way in _MOVES.items()),
    sampling={"temperature": 0.0},
)
TEXT16 = Workload("text16", "free text of 16 tokens", sampling={"temperature": 0.0, "max_tokens": 16})
WORKLOADS = (CHOICE1, CHOICE12, TEXT16)


@dataclass(frozen=True, slots=True)
class Cell:
    """A point of the grid: `num_episodes` concurrent episodes of `num_steps` steps each.

    A short cell plays `num_sets` sets of such episodes, one after the other, so that it is long enough to measure. A
    `service_only` cell is for a target that concerns only the service.
    """

    workload: Workload
    num_episodes: int
    num_steps: int
    num_sets: int = 1
    service_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.size}"

    @property
    def size(self) -> str:
        return f"{self.num_episodes}x{self.num_steps}"


def grid(*, quick: bool) -> list[Cell]:
    """All cells: each workload with 1, 8 and 32 episodes of 20 and 100 steps.

    Cells of 200 steps measure how the service's CPU time per step depends on the length of an episode.
    """
    episodes, steps = ((1, 4), (5,)) if quick else ((1, 8, 32), (20, 100))
    cells = [_cell(workload, n, k, quick=quick) for workload, k, n in product(WORKLOADS, steps, episodes)]
    if not quick:
        cells += [_cell(CHOICE1, n, 200, service_only=True) for n in (1, 32)]
    return cells


def _cell(workload: Workload, n: int, k: int, *, quick: bool = False, service_only: bool = False) -> Cell:
    at_least = 1 if quick else 60 if workload is TEXT16 else 200
    return Cell(workload, n, k, max(1, -(-at_least // (n * k))), service_only)


def observations(run: int, episode: int, num_steps: int) -> list[str]:
    """An episode's observations. The first one is unique, so that no run can reuse another run's prefix cache."""
    return [f"run {run}, episode {episode}: {text}" if step == 0 else text for step, text in _walk(episode, num_steps)]


def _walk(episode: int, num_steps: int) -> Iterator[tuple[int, str]]:
    for step in range(num_steps):
        row, column = (episode + step) % 8, (3 * episode + 5 * step) % 12
        yield step, f"row {row}, column {column}, destination row {column % 5}, column {row % 5}"
