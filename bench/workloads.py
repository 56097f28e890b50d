"""What the contenders have to play: the grid of cells, the action spaces, and the observations of an episode."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

INSTRUCTIONS = "Walk from S to G over F. H is a hole. Actions: left, down, right, up."

Model = Literal["policy", "qwen3", "smollm2"]
"""Which model a workload is played on: the one of `--model`, a random Qwen3, or SmolLM2-135M."""

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


_MESSAGES = (
    "My parcel has not arrived, although it was sent a week ago.",
    "The invoice lists two chargers. I bought one.",
    "How do I change the address of my account?",
    "The screen was cracked when I opened the box.",
    "Thank you, the new lamp is lovely.",
    "I would like to send the shoes back, they are too small.",
    "Your page shows an error when I pay by card.",
    "Is the blue jacket available in size L?",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """The kind of actions: one of `actions`, or free text if there are none. All contenders use the same `sampling`.

    `contenders` play it. `texts` are the observations, in turns; if there are none, they are positions on a map.
    """

    name: str
    title: str
    contenders: tuple[str, ...]
    actions: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    model: Model = "policy"
    instructions: str = INSTRUCTIONS
    texts: tuple[str, ...] = ()


_GREEDY = {"temperature": 0.0}
_DISCRETE = ("service", "batch", "openai", "engine")
_SUPPORT = "You answer the customers of a shop."

CHOICE1 = Workload("choice1", "actions of 1 token", _DISCRETE, ("left", "down", "right", "up"), _GREEDY)
CHOICE12 = Workload(
    "choice12",
    "actions of 12 tokens",
    _DISCRETE,
    tuple(f"{move} from {way}." for move, way in _MOVES.items()),
    _GREEDY,
)
TEXT16 = Workload(
    "text16", "free text of 16 tokens", (*_DISCRETE, "logprobs"), sampling={"temperature": 0.0, "max_tokens": 16}
)
DECISION = Workload(
    "decision",
    "actions of 1 token, random Qwen3",
    ("service", "systemone"),
    ("left", "down", "right", "up"),
    _GREEDY,
    "qwen3",
)
LABEL = Workload(
    "label",
    "labels of 1 to 3 tokens, SmolLM2",
    ("service", "openai"),
    (
        "billing",
        "delivery",
        "faulty product",
        "return of goods",
        "account",
        "praise",
        "payment error",
        "article in stock",
    ),
    _GREEDY,
    "smollm2",
    f"{_SUPPORT} Which topic does the message have?",
    _MESSAGES,
)
REPLY = Workload(
    "reply",
    "replies of 12 tokens, SmolLM2",
    ("service", "openai"),
    (
        "We will send a replacement to you today, free of charge.",
        "Please open the settings of your account and change it there.",
        "Your money will be on your account within five working days.",
        "Print the label in your account and bring the parcel to a shop.",
        "It is a pleasure to hear that. Thank you for writing.",
        "Our technicians are working on this problem. Try again in an hour.",
        "Yes, this article is available. Shall we put one aside?",
        "The carrier says that the parcel will reach you tomorrow.",
    ),
    _GREEDY,
    "smollm2",
    f"{_SUPPORT} Choose the best reply.",
    _MESSAGES,
)
WORKLOADS = (CHOICE1, CHOICE12, TEXT16, DECISION, LABEL, REPLY)


def played_on(model: Model) -> tuple[Workload, ...]:
    """The workloads that are played on a model."""
    return tuple(workload for workload in WORKLOADS if workload.model == model)


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

    @property
    def contenders(self) -> tuple[str, ...]:
        """The contenders that play this cell. A batch of one act is no batch."""
        if self.service_only:
            return ("service",)
        return tuple(name for name in self.workload.contenders if name != "batch" or self.num_episodes > 1)


_SIZES: dict[Model, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "policy": ((20, 100), (1, 8, 32)),
    "qwen3": ((20,), (1, 32)),
    "smollm2": ((12,), (1, 8)),
}
"""The numbers of steps, and of episodes, of a model's cells."""


def grid(*, quick: bool) -> list[Cell]:
    """All cells: each workload with each number of episodes and steps.

    Cells of 200 steps measure how the service's CPU time per step depends on the length of an episode.
    """
    cells: list[Cell] = []
    for model, (steps, episodes) in _SIZES.items():
        sizes = product(played_on(model), *(((5,), (1, 4)) if quick else (steps, episodes)))
        cells += [_cell(workload, n, k, quick=quick) for workload, k, n in sizes]
        if model == "policy" and not quick:
            cells += [_cell(CHOICE1, n, 200, service_only=True) for n in (1, 32)]
    return cells


def _cell(workload: Workload, n: int, k: int, *, quick: bool = False, service_only: bool = False) -> Cell:
    at_least = 1 if quick else 60 if workload is TEXT16 or workload.model == "smollm2" else 200
    return Cell(workload, n, k, max(1, -(-at_least // (n * k))), service_only)


def observations(run: int, episode: int, num_steps: int, texts: tuple[str, ...] = ()) -> list[str]:
    """An episode's observations: these texts in turns, or positions on a map.

    The first one is unique, so that no run can reuse another run's prefix cache.
    """
    turns = ((step, texts[(episode + step) % len(texts)]) for step in range(num_steps)) if texts else None
    return [
        f"run {run}, episode {episode}: {text}" if step == 0 else text
        for step, text in turns or _walk(episode, num_steps)
    ]


def _walk(episode: int, num_steps: int) -> Iterator[tuple[int, str]]:
    for step in range(num_steps):
        row, column = (episode + step) % 8, (3 * episode + 5 * step) % 12
        yield step, f"row {row}, column {column}, destination row {column % 5}, column {row % 5}"
