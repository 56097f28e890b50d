"""All statistics in one place, so that callers write `statistics.rate(...)`."""

from service.evaluation.agreement import Metric, krippendorff_alpha
from service.evaluation.comparisons import (
    MIN_PAIRS,
    Comparison,
    Kind,
    Method,
    Verdict,
    holm,
    paired,
    unpaired,
    verdict,
)
from service.evaluation.intervals import (
    InterquartileMean,
    Interval,
    Mean,
    Rate,
    interquartile_mean,
    mean,
    rate,
)
from service.evaluation.repeats import pass_all_k, pass_at_k

__all__ = [
    "MIN_PAIRS",
    "Comparison",
    "InterquartileMean",
    "Interval",
    "Kind",
    "Mean",
    "Method",
    "Metric",
    "Rate",
    "Verdict",
    "holm",
    "interquartile_mean",
    "krippendorff_alpha",
    "mean",
    "paired",
    "pass_all_k",
    "pass_at_k",
    "rate",
    "unpaired",
    "verdict",
]
