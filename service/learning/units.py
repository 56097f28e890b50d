"""What is trained: examples in units, how they were chosen, and which episodes can be compared with each other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from service.learning.options import GroupBy
from service.learning.segments import Floats, Kind, Row
from service.learning.trajectories import Episode


@dataclass(frozen=True, slots=True)
class Example:
    """A row, and the weight of each of its trained tokens.

    weights: bc: the weight. grpo: the advantage. dpo: 1 in the better episode of a pair, -1 in the worse one.
    """

    row: Row
    weights: Floats


Unit = tuple[Example, ...]
"""Examples that belong together: a segment (bc, grpo), or all segments of a pair (dpo)."""


@dataclass(slots=True)
class Selection:
    """The units, and how they were chosen.

    excluded: number of episodes that are not trained, by reason.
    """

    units: list[Unit] = field(default_factory=list[Unit])
    num_episodes: int = 0
    num_used: int = 0
    num_groups: int = 0
    mean_return: float | None = None
    excluded: Counter[str] = field(default_factory=Counter[str])
    warnings: list[str] = field(default_factory=list[str])

    def with_result(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Returns the episodes that were not given up, and counts the others as excluded."""
        self.excluded.update(str(episode.stop_reason) for episode in episodes if not episode.has_result)
        return [episode for episode in episodes if episode.has_result]

    def describe(self, used: Sequence[Episode]) -> None:
        """Notes the episodes that are trained."""
        self.num_used = len({episode.episode_id for episode in used})
        returns = [episode.episode_return for episode in used if episode.episode_return is not None]
        self.mean_return = fmean(returns) if returns else None

    @property
    def rows(self) -> list[Row]:
        return [example.row for unit in self.units for example in unit]

    def kinds(self) -> dict[str, float]:
        """The share of each kind among the trained tokens."""
        counts = np.bincount(np.concatenate([row.kinds for row in self.rows]), minlength=len(Kind))
        return {kind.name.lower(): float(counts[kind] / counts.sum()) for kind in Kind if counts[kind]}

    def as_json(self) -> dict[str, Any]:
        rows = self.rows
        return {
            "episodes": self.num_episodes,
            "episodes_used": self.num_used,
            "episodes_excluded": dict(sorted(self.excluded.items())),
            "groups": self.num_groups,
            "units": len(self.units),
            "segments": len(rows),
            "steps": _num_steps(rows),
            "tokens": sum(row.length for row in rows),
            "trained_tokens": sum(len(row.positions) for row in rows),
            "token_kinds": self.kinds(),
            "mean_return": self.mean_return,
        }


def _num_steps(rows: Sequence[Row]) -> int | None:
    """The number of trained steps; None if an export does not say where steps begin."""
    if any((row.steps < 0).any() for row in rows):
        return None
    return sum(len(np.unique(row.steps)) for row in rows)


def groups(episodes: Sequence[Episode], by: GroupBy) -> dict[tuple[str, ...], list[Episode]]:
    """Returns the episodes that can be compared with each other.

    by="seed": the episodes of a `group`; forks have one with the episode that they were forked from. Episodes without a
    group are compared with those of the same environment and seed.
    by="start": the episodes that begin with the same prompt, whatever their groups and seeds are.
    """
    parents = {episode.parent[0] for episode in episodes if episode.parent}
    found: dict[tuple[str, ...], list[Episode]] = {}
    for episode in episodes:
        key = _start(episode) if by == "start" else _group(episode, parents)
        found.setdefault(key, []).append(episode)
    return found


def _group(episode: Episode, parents: set[str]) -> tuple[str, ...]:
    if episode.group is not None:
        return ("group", episode.group)
    if episode.episode_id in parents:
        return ("group", episode.episode_id)  # the group of its forks has its id
    return ("situation", *episode.situation) if episode.situation else ("episode", episode.episode_id)


def _start(episode: Episode) -> tuple[str, ...]:
    """The tokens of the first prompt: those before the first token that can be trained."""
    if not episode.rows:
        return ("episode", episode.episode_id)
    return ("start", episode.rows[0].prompt.hex())


def scored(episodes: Sequence[Episode]) -> list[Episode]:
    """Returns the episodes that have a return."""
    return [episode for episode in episodes if episode.episode_return is not None]


def score_of(episode: Episode) -> float:
    assert episode.episode_return is not None  # the caller leaves out the others; see `scored`
    return episode.episode_return
