"""The report of a soak test: how fast each figure grows after the warm-up, a verdict in words, and a plot."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

ENOUGH_S = 600.0
"""The minimum time in seconds after the warm-up. Shorter runs cannot show whether a figure grows."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The state of the service `at_s` seconds after the load began. Memory is resident memory, sizes are in MB."""

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
    """Free pages of the store's file, which SQLite uses before the file grows."""
    wal_mb: float
    episodes: int
    tombstones: int
    steps: int


@dataclass(frozen=True, slots=True)
class Figure:
    """A field of `Sample` whose growth is watched, with its title and unit."""

    name: str
    title: str
    unit: str
    at_most_an_hour: float
    """The maximum increase per hour that may be noise. Infinite for a figure that grows by design."""


FIGURES = (
    Figure("server_mb", "memory of the server", "MB", 20.0),
    Figure("engine_mb", "memory of the engine", "MB", 20.0),
    Figure("num_fds", "file descriptors", "", 4.0),
    Figure("num_threads", "threads", "", 4.0),
    Figure("num_tasks", "asyncio tasks", "", 8.0),
    Figure("live_episodes", "cached episodes", "", 400.0),
    Figure("steps", "steps in the store", "", 3000.0),
    Figure("store_mb", "the store's file", "MB", math.inf),
    Figure("free_mb", "free pages of the store", "MB", 8.0),
    Figure("wal_mb", "write-ahead log of the store", "MB", 8.0),
)


@dataclass(frozen=True, slots=True)
class Trend:
    """The change of a figure after the warm-up: its level at both ends, and its slope per hour."""

    figure: Figure
    first: float
    last: float
    an_hour: float

    @property
    def grows(self) -> bool:
        return self.an_hour > self.figure.at_most_an_hour

    def __str__(self) -> str:
        unit = f" {self.figure.unit}" if self.figure.unit else ""
        expected = math.isinf(self.figure.at_most_an_hour)
        what = "grows" if self.grows else "expected to grow" if expected else "does not grow"
        levels = f"{self.first:.4g} to {self.last:.4g}{unit}"
        return f"{self.figure.title}: {levels}, {self.an_hour:+.1f}{unit} per hour: {what}"


def trends(samples: Sequence[Sample], warm_up_s: float) -> list[Trend]:
    """The trend of each figure, from the samples after the warm-up."""
    warm = [sample for sample in samples if sample.at_s >= warm_up_s]
    return [
        _trend(figure, [(sample.at_s, float(getattr(sample, figure.name))) for sample in warm]) for figure in FIGURES
    ]


def _trend(figure: Figure, points: Sequence[tuple[float, float]]) -> Trend:
    some = max(len(points) // 5, 1)
    first, last = (statistics.median(value for _, value in part) for part in (points[:some], points[-some:]))
    return Trend(figure, first, last, slope(points) * 3600)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of a line through the points, 0 for fewer than two points.

    It is the median of the slopes between all pairs of points (Theil, 1950; Sen, 1968), so that a few outliers, for
    example samples during an export, do not affect it.
    """
    thinned = points[:: max(len(points) // 200, 1)]
    slopes = [(late[1] - early[1]) / (late[0] - early[0]) for early, late in combinations(thinned, 2)]
    return statistics.median(slopes) if slopes else 0.0


def bytes_each(samples: Sequence[Sample]) -> tuple[float, float]:
    """The bytes that a step and the tombstone of a deleted episode take in the store's file.

    Both numbers change during a run, so they are estimated by least squares over the samples.
    """
    import numpy as np

    numbers = np.array([[sample.steps, sample.tombstones, 1.0] for sample in samples])
    used = np.array([(sample.store_mb - sample.free_mb) * 1e6 for sample in samples])
    of_step, of_tombstone, _ = np.linalg.lstsq(numbers, used, rcond=None)[0]
    return float(of_step), float(of_tombstone)


def verdict(found: Sequence[Trend], measured_s: float, failures: int) -> str:
    """The verdict in words, as the last line. `measured_s` is the measured time after the warm-up in seconds."""
    growing = [f"{trend.figure.title} ({trend.an_hour:+.0f} per hour)" for trend in found if trend.grows]
    grows = f"Grows: {', '.join(growing)}." if growing else "Nothing grows."
    if measured_s < ENOUGH_S:
        grows = f"{measured_s / 60:.0f} minutes after the warm-up are too short for a verdict."
    return grows + (f" {failures} calls failed unexpectedly." if failures else " All calls succeeded.")


def document(samples: Sequence[Sample], found: Sequence[Trend]) -> dict[str, Any]:
    return {"trends": [asdict(trend) for trend in found], "samples": [asdict(sample) for sample in samples]}


def plot(path: Path, samples: Sequence[Sample], found: Sequence[Trend], warm_up_s: float) -> None:
    """Plots each figure over time in its own panel. The warm-up is shaded."""
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
        axis.set_title(f"{trend.figure.title}{unit}\n{trend.an_hour:+.1f} per hour", fontsize=10)
        axis.set_ylim(0, max(*values, 1) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
