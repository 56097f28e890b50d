"""Owns what a soak shows: how fast each figure grows once the service is warm, a verdict in words, and a plot."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

ENOUGH_S = 600.0
"""A shorter time says nothing about growth."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The service at one moment, `at_s` seconds after the load began. Memory is resident; sizes are in MB."""

    at_s: float
    server_mb: float
    engine_mb: float
    num_fds: int
    num_threads: int
    num_tasks: float
    live_episodes: float
    acts: float
    store_mb: float
    free_mb: float
    """Of the store's file, pages that hold nothing and are used next."""
    wal_mb: float
    episodes: int
    tombstones: int
    steps: int


@dataclass(frozen=True, slots=True)
class Figure:
    """What is watched: a field of the samples, and how to say it."""

    name: str
    title: str
    unit: str
    at_most_an_hour: float
    """What may be noise: more than this is growth. Infinite for what grows by nature."""


FIGURES = (
    Figure("server_mb", "memory of the server", "MB", 20.0),
    Figure("engine_mb", "memory of the engine", "MB", 20.0),
    Figure("num_fds", "file descriptors", "", 4.0),
    Figure("num_threads", "threads", "", 4.0),
    Figure("num_tasks", "asyncio tasks", "", 8.0),
    Figure("live_episodes", "episodes in memory", "", 400.0),
    Figure("steps", "steps in the store", "", 3000.0),
    Figure("store_mb", "the store's file", "MB", math.inf),
    Figure("free_mb", "free pages in it", "MB", 8.0),
    Figure("wal_mb", "its write-ahead log", "MB", 8.0),
)


@dataclass(frozen=True, slots=True)
class Trend:
    """How a figure moved after the warm-up."""

    figure: Figure
    first: float
    last: float
    an_hour: float

    @property
    def grows(self) -> bool:
        return self.an_hour > self.figure.at_most_an_hour

    def __str__(self) -> str:
        unit = f" {self.figure.unit}" if self.figure.unit else ""
        by_nature = math.isinf(self.figure.at_most_an_hour)
        what = "grows" if self.grows else "by nature" if by_nature else "flat"
        return (
            f"{self.figure.title}: {self.first:.4g} to {self.last:.4g}{unit}, {self.an_hour:+.1f}{unit} an hour: {what}"
        )


def trends(samples: Sequence[Sample], warm_up_s: float) -> list[Trend]:
    """Of each figure, from what was sampled after the warm-up: its level at both ends, and its slope."""
    warm = [sample for sample in samples if sample.at_s >= warm_up_s]
    return [
        _trend(figure, [(sample.at_s, float(getattr(sample, figure.name))) for sample in warm]) for figure in FIGURES
    ]


def _trend(figure: Figure, points: Sequence[tuple[float, float]]) -> Trend:
    some = max(len(points) // 5, 1)
    first, last = (statistics.median(value for _, value in part) for part in (points[:some], points[-some:]))
    return Trend(figure, first, last, slope(points) * 3600)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs of points (Theil, 1950; Sen, 1968): a few that are far off, such as an
    export in progress, do not tilt it. 0 for fewer than two points."""
    thinned = points[:: max(len(points) // 200, 1)]
    slopes = [(late[1] - early[1]) / (late[0] - early[0]) for early, late in combinations(thinned, 2)]
    return statistics.median(slopes) if slopes else 0.0


def bytes_each(samples: Sequence[Sample]) -> tuple[float, float]:
    """What a stored step and the tombstone of a deleted episode add to the store's file: the least squares over the
    samples, as both numbers move."""
    import numpy as np

    numbers = np.array([[sample.steps, sample.tombstones, 1.0] for sample in samples])
    used = np.array([(sample.store_mb - sample.free_mb) * 1e6 for sample in samples])
    of_step, of_tombstone, _ = np.linalg.lstsq(numbers, used, rcond=None)[0]
    return float(of_step), float(of_tombstone)


def verdict(found: Sequence[Trend], measured_s: float, failures: int) -> str:
    """The last line: what grows, in plain words. `measured_s`: how long the service was watched after the warm-up."""
    growing = [f"{trend.figure.title} ({trend.an_hour:+.0f} an hour)" for trend in found if trend.grows]
    grows = f"Grows: {', '.join(growing)}." if growing else "Nothing grows."
    if measured_s < ENOUGH_S:
        grows = f"{measured_s / 60:.0f} minutes after the warm-up do not tell what an hour brings."
    return grows + (f" {failures} calls failed that should not have." if failures else " Every call was answered.")


def document(samples: Sequence[Sample], found: Sequence[Trend]) -> dict[str, Any]:
    return {"trends": [asdict(trend) for trend in found], "samples": [asdict(sample) for sample in samples]}


def plot(path: Path, samples: Sequence[Sample], found: Sequence[Trend], warm_up_s: float) -> None:
    """A panel a figure over the minutes, the warm-up shaded."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure: Any
    figure, axes = pyplot.subplots(2, 5, figsize=(17, 5.6), squeeze=False)
    minutes = [sample.at_s / 60 for sample in samples]
    for axis, trend in zip(axes.flat, found, strict=True):
        values = [getattr(sample, trend.figure.name) for sample in samples]
        axis.plot(minutes, values, color="#2a6f97", linewidth=1.2)
        axis.axvspan(0, warm_up_s / 60, color="#9aa5ad", alpha=0.2)
        unit = f", {trend.figure.unit}" if trend.figure.unit else ""
        axis.set_title(f"{trend.figure.title}{unit}\n{trend.an_hour:+.1f} an hour", fontsize=10)
        axis.set_ylim(0, max(*values, 1) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
