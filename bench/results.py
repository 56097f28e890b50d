"""The results: samples by cell and contender, their medians and ratios, and the targets ("bars")."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

from bench.measure import Sample
from bench.workloads import CHOICE1, CHOICE12, TEXT16, Cell

AGAIN = "service again"
"""The name of the service's additional round, after the other rounds of a cell.

Its difference from their median is the noise.
"""

_FIGURES = tuple(field.name for field in fields(Sample) if field.name != "timing_ms")


@dataclass(frozen=True, slots=True)
class CellResult:
    """The samples of a cell: for each contender a list with one sample for each round."""

    cell: Cell
    samples: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])

    def median(self, contender: str, figure: str) -> float | None:
        """The median of a field of `Sample` over the rounds. None if the contender did not run."""
        values = [getattr(sample, figure) for sample in self.samples.get(contender, ())]
        return median(values) if values else None

    def ratio(self, contender: str, other: str, figure: str = "steps_per_s") -> float | None:
        value, base = self.median(contender, figure), self.median(other, figure)
        return value / base if value and base else None

    @property
    def noise(self) -> float | None:
        """The relative difference in steps/s between the service's additional round and the median of its rounds."""
        again = self.ratio(AGAIN, "service")
        return again and abs(again - 1)

    def spread(self, contender: str) -> float | None:
        """The difference in steps/s between the fastest and the slowest round, relative to the median."""
        values = [sample.steps_per_s for sample in self.samples.get(contender, ())]
        return (max(values) - min(values)) / median(values) if values else None

    def document(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "workload": self.cell.workload.name,
            "episodes": self.cell.num_episodes,
            "steps": self.cell.num_steps,
            "sets": self.cell.num_sets,
            "medians": {name: {figure: self.median(name, figure) for figure in _FIGURES} for name in self.samples},
            "ratios": {
                "service/openai": self.ratio("service", "openai"),
                "service/engine": self.ratio("service", "engine"),
            },
            "noise": self.noise,
            "spread": {name: self.spread(name) for name in self.samples},
            "rounds": {name: [asdict(sample) for sample in samples] for name, samples in self.samples.items()},
        }


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and its target. `value` is None if the figure was not measured."""

    what: str
    value: float | None
    limit: float
    at_least: bool

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def bars(results: Sequence[CellResult]) -> list[Bar]:
    """All targets for which these results have the figures."""
    by_name = {result.cell.name: result for result in results}
    found: list[Bar] = []

    def ratio(other: str, limit: float, workload: str, *sizes: str) -> None:
        for size in sizes:
            if result := by_name.get(f"{workload} {size}"):
                what = f"service/{other} steps/s, {result.cell.workload.title}, {size}"
                found.append(Bar(what, result.ratio("service", other), limit, at_least=True))

    grid = [f"{episodes}x{steps}" for steps in (20, 100) for episodes in (1, 8, 32)]
    ratio("openai", 2.0, CHOICE1.name, "32x20", "32x100")
    ratio("openai", 4.0, CHOICE12.name, "32x100")
    ratio("openai", 6.0, CHOICE12.name, "1x20")
    ratio("openai", 1.0, TEXT16.name, *grid)
    for workload in (CHOICE1, CHOICE12, TEXT16):
        ratio("engine", 0.9, workload.name, "32x20")
    found += _cpu_bars(by_name)
    return [bar for bar in found if bar.value is not None]


def _cpu_bars(by_name: dict[str, CellResult]) -> list[Bar]:
    found: list[Bar] = []
    for workload in (CHOICE1, CHOICE12):
        for n in (1, 8, 32):
            if short := by_name.get(f"{workload.name} {n}x20"):
                what = f"API-process CPU ms a step, {workload.title}, {n}x20"
                found.append(Bar(what, short.median("service", "cpu_ms_per_step"), 1.0, at_least=False))
    for n in (1, 32):
        short, long = by_name.get(f"{CHOICE1.name} {n}x20"), by_name.get(f"{CHOICE1.name} {n}x200")
        if short and long:
            value = _quotient(long.median("service", "cpu_ms_per_step"), short.median("service", "cpu_ms_per_step"))
            found.append(Bar(f"API-process CPU a step at 200 steps over 20, {n} episodes", value, 1.2, at_least=False))
    return found


def _quotient(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
