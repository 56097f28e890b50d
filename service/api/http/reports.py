"""Models of the answer to GET /evaluation. The OpenAPI document is generated from them and from their docstrings."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.filters import By, Metric


class _Response(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Completion(_Response):
    """The share of successes among the episodes whose success is known, with Wilson's interval."""

    rate: float | None
    low: float | None
    high: float | None
    n: int
    """The number of these episodes."""


class Returns(_Response):
    """The returns of the episodes that ended with a result."""

    mean: float | None
    low: float | None
    """The interval of the mean: Student's t, with standard errors that are robust to clusters."""
    high: float | None
    iqm: float | None
    """The interquartile mean: that of the middle half of the returns."""
    iqm_low: float | None
    iqm_high: float | None
    sd: float | None
    min: float | None
    max: float | None
    n: int
    """The number of these episodes."""


class Length(_Response):
    """Numbers of steps of the episodes that ended with a result."""

    mean: float | None
    p50: float | None
    p95: float | None


class Human(_Response):
    """Ratings of whole episodes. Each episode counts with the mean of its ratings."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    """The number of rated episodes."""
    raters: int
    """The number of persons who rated with a name."""
    alpha: float | None
    """Krippendorff's alpha of the ratings with a name: 1 is perfect agreement, 0 is what chance gives. Null if no
    episode has two of them, or if all are equal."""


class Tokens(_Response):
    """Numbers of tokens of the episodes that ended with a result."""

    total: int
    mean: float | None


class ActSeconds(_Response):
    """Durations of sampled acts in seconds, from the request to the commit. Null if none is known."""

    p50: float | None
    p99: float | None


class Group(_Response):
    """The episodes with one value of `by`."""

    value: str | None
    """Null for the episodes that have no value."""
    episodes: int
    ended: int
    excluded: dict[str, int]
    """The number of episodes by the reason for which they are left out: `active`, `aborted` and `idle_ttl` count only
    here; `unscored` ones, whose success is unknown, are left out of `completion` only."""
    completion: Completion
    returns: Returns = Field(alias="return")
    length: Length
    human: Human
    pass_at: dict[str, float] | None
    """The probability that one of k plays of a seed succeeds, by k: 1 and the most common number of plays. Null if
    most seeds were played once."""
    pass_all: dict[str, float] | None
    """The probability that all of k plays of a seed succeed, by k."""
    parse_failures: int | None
    """The number of completions that are no action. Null if it is unknown."""
    tokens: Tokens
    act_seconds: ActSeconds


class Comparison(_Response):
    """A group compared with the baseline."""

    a: str | None
    """The value of the group."""
    b: str | None
    """The baseline."""
    metric: Metric
    pairs: int
    """The number of seeds that were played in both; 0 if the comparison is unpaired."""
    delta: float | None
    """The mean of the group minus that of the baseline."""
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    """The p-value adjusted for the number of comparisons in the report, by Holm's method."""
    method: Literal["paired_t", "paired_bootstrap", "mcnemar_exact", "welch", "permutation"]
    """How the p-value was computed."""
    verdict: Literal["better", "worse", "tied", "too_few"]


class Warned(_Response):
    """Something that limits what the report says."""

    code: str
    """A stable name, for programs."""
    detail: str


class Evaluation(_Response):
    """The answer to GET /evaluation."""

    by: By
    level: float
    groups: list[Group]
    """Sorted by their values; the group without a value is last."""
    comparisons: list[Comparison]
    """Empty without a `baseline`."""
    warnings: list[Warned]
