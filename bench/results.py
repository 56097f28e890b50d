"""The results: samples by cell and contender, their medians and ratios, and the targets ("bars")."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

from bench.measure import Sample
from bench.workloads import CHOICE1, CHOICE12, DECISION, LABEL, REPLY, TEXT16, Cell, Workload

AGAIN = "service again"
"""The name of the service's additional round, after the other rounds of a cell.

Its difference from their median is the noise.
"""

_CPU = "cpu_ms_per_step"
_RATIOS = (
    ("service", "openai"),
    ("service", "logprobs"),
    ("service", "engine"),
    ("service", "systemone"),
    ("batch", "engine"),
)
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
            "ratios": {f"{a}/{b}": self.ratio(a, b) for a, b in _RATIOS if a in self.samples and b in self.samples},
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


_ONE = ("1x20", "1x100")
_SEVERAL = ("8x20", "8x100", "32x20", "32x100")
_SPEED: tuple[tuple[str, str, float, Workload, tuple[str, ...]], ...] = (
    ("service", "engine", 0.85, CHOICE1, _SEVERAL),
    ("service", "engine", 0.8, CHOICE1, _ONE),
    ("service", "engine", 0.85, CHOICE12, _SEVERAL),
    ("service", "engine", 0.8, CHOICE12, _ONE),
    ("service", "engine", 0.9, TEXT16, (*_ONE, *_SEVERAL)),
    ("batch", "engine", 0.9, CHOICE1, ("32x20",)),
    ("batch", "engine", 0.9, CHOICE12, ("32x20",)),
    ("batch", "engine", 0.9, TEXT16, ("32x20",)),
    ("service", "openai", 1.9, CHOICE1, ("32x20",)),
    ("service", "openai", 2.0, CHOICE1, ("32x100",)),
    ("service", "openai", 3.2, CHOICE12, ("32x100",)),
    ("service", "openai", 6.0, CHOICE12, ("1x20",)),
    ("service", "logprobs", 1.0, TEXT16, (*_ONE, *_SEVERAL)),
    ("service", "openai", 0.97, TEXT16, (*_ONE, *_SEVERAL)),
    ("service", "systemone", 1.3, DECISION, ("1x20", "32x20")),
    ("service", "openai", 1.9, LABEL, ("1x12", "8x12")),
    ("service", "openai", 3.0, REPLY, ("1x12", "8x12")),
)
"""The least ratios of steps per second: contender, other contender, limit, workload, sizes."""

_MAX_CPU_RATIO = 1.8
"""CPU time of a step in the API process, compared with that of the bare engine's client."""
_MAX_CPU_GROWTH = 1.1
"""CPU time of a step in episodes of 200 steps, compared with that in episodes of 20."""


def bars(results: Sequence[CellResult]) -> list[Bar]:
    """All targets for which these results have the figures."""
    by_name = {result.cell.name: result for result in results}
    found: list[Bar] = []
    for name, other, limit, workload, sizes in _SPEED:
        for result in (by_name.get(f"{workload.name} {size}") for size in sizes):
            if result:
                what = f"{name}/{other} steps/s, {workload.title}, {result.cell.size}"
                found.append(Bar(what, result.ratio(name, other), limit, at_least=True))
    found += _cpu_bars(by_name)
    return [bar for bar in found if bar.value is not None]


def _cpu_bars(by_name: dict[str, CellResult]) -> list[Bar]:
    found: list[Bar] = []
    for n in (1, 32):
        short, long = by_name.get(f"{CHOICE1.name} {n}x20"), by_name.get(f"{CHOICE1.name} {n}x200")
        if short:
            what = f"service/engine API-process CPU a step, {CHOICE1.title}, {n}x20"
            found.append(Bar(what, short.ratio("service", "engine", _CPU), _MAX_CPU_RATIO, at_least=False))
        if short and long:
            value = _quotient(long.median("service", _CPU), short.median("service", _CPU))
            what = f"API-process CPU a step at 200 steps over 20, {n} episodes"
            found.append(Bar(what, value, _MAX_CPU_GROWTH, at_least=False))
    return found


def _quotient(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
