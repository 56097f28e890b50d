"""The values in the answer to GET /evaluation. See docs/api.md for what each field means."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from service.client.models import Value


class Completion(Value):
    """The share of successes among `n` episodes whose success is known, with its interval."""

    rate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0


class Returns(Value):
    """The returns of `n` episodes: mean and interquartile mean with their intervals, and the range."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    iqm: float | None = None
    iqm_low: float | None = None
    iqm_high: float | None = None
    sd: float | None = None
    min: float | None = None
    max: float | None = None
    n: int = 0


class Length(Value):
    """Numbers of steps."""

    mean: float | None = None
    p50: float | None = None
    p95: float | None = None


class Human(Value):
    """Ratings of `n` episodes by `raters` persons with a name; `alpha` is their agreement."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    raters: int = 0
    alpha: float | None = None


class Tokens(Value):
    """Numbers of tokens."""

    total: int = 0
    mean: float | None = None


class ActSeconds(Value):
    """Durations of sampled acts, in seconds."""

    p50: float | None = None
    p99: float | None = None


class EvaluationGroup(Value):
    """The episodes with one value of what the evaluation groups by; `value` is None for those without one."""

    value: str | None
    episodes: int
    ended: int
    excluded: Mapping[str, int] = Field(default_factory=dict[str, int])
    completion: Completion = Completion()
    returns: Returns = Field(Returns(), alias="return")
    length: Length = Length()
    human: Human = Human()
    pass_at: dict[int, float] | None = None
    pass_all: dict[int, float] | None = None
    parse_failures: int | None = None
    tokens: Tokens = Tokens()
    act_seconds: ActSeconds = ActSeconds()


class Comparison(Value):
    """Group `a` compared with the baseline `b`: `delta` is the mean of `a` minus that of `b`."""

    a: str | None
    b: str | None
    metric: str
    pairs: int
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    method: str
    verdict: str


class EvaluationWarning(Value):
    """Something that limits what an evaluation says."""

    code: str
    detail: str


class Evaluation(Value):
    """Groups of episodes, and their comparisons with a baseline."""

    by: str
    level: float
    groups: tuple[EvaluationGroup, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    warnings: tuple[EvaluationWarning, ...] = ()
