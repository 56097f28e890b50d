"""The report of an evaluation: what is asked, and what is answered."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.evaluation.statistics import Method, Rate, Verdict
from service.filters import By, Metric


@dataclass(frozen=True, slots=True)
class Question:
    """What an evaluation is asked. `metric` None: both. `level`: confidence level."""

    by: By = "policy"
    baseline: str | None = None
    metric: Metric | None = None
    level: float = 0.95

    @property
    def metrics(self) -> Sequence[Metric]:
        return ("completion", "return") if self.metric is None else (self.metric,)


@dataclass(frozen=True, slots=True)
class Returns:
    """The returns of `n` episodes: their mean and their interquartile mean, with intervals."""

    mean: float | None
    low: float | None
    high: float | None
    iqm: float | None
    iqm_low: float | None
    iqm_high: float | None
    sd: float | None
    min: float | None
    max: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Length:
    """Numbers of steps."""

    mean: float | None
    p50: float | None
    p95: float | None


@dataclass(frozen=True, slots=True)
class Human:
    """The mean of the episodes' mean ratings. `n`: rated episodes. `raters`: persons with a name. `alpha`:
    Krippendorff's alpha of their ratings."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    raters: int
    alpha: float | None


@dataclass(frozen=True, slots=True)
class Tokens:
    total: int
    mean: float | None


@dataclass(frozen=True, slots=True)
class Seconds:
    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """The episodes with one value of what the report groups by; see `docs/api.md` for which episodes count where.

    pass_at, pass_all: by the number of plays of one seed; None if no seed was played several times.
    parse_failures: None if no episode's number is known.
    """

    value: str | None
    episodes: int
    ended: int
    excluded: Mapping[str, int]
    completion: Rate
    returns: Returns
    length: Length
    human: Human
    pass_at: Mapping[int, float] | None
    pass_all: Mapping[int, float] | None
    parse_failures: int | None
    tokens: Tokens
    act_seconds: Seconds


@dataclass(frozen=True, slots=True)
class Compared:
    """Group `a` compared with the baseline `b`: `delta` is a minus b."""

    a: str | None
    b: str | None
    metric: Metric
    pairs: int
    delta: float | None
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    method: Method
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that limits what the report says."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    by: By
    level: float
    groups: Sequence[Group]
    comparisons: Sequence[Compared]
    warnings: Sequence[Warned]

    def as_json(self) -> dict[str, Any]:
        """The report as GET /evaluation returns it."""
        document = asdict(self)
        for group in document["groups"]:
            group["return"] = group.pop("returns")
        return document
