"""Comparisons of a policy with a baseline: the difference, its interval, a p-value, and a verdict.

`a` is the policy and `b` the baseline. A positive difference means that the policy is better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from service.evaluation.bootstrap import (
    MAX_BOOTSTRAPPED,
    Floats,
    Interval,
    Labels,
    expanded_interval,
    expanded_p,
    resampled,
)
from service.evaluation.distributions import normal_quantile, permutation_test, sign_test, t_quantile, t_test
from service.evaluation.intervals import effective_size, standard_error, wilson

Kind = Literal["completion", "return"]
Method = Literal["paired_t", "paired_bootstrap", "mcnemar_exact", "welch", "permutation"]
"""How the p-value was computed: see `paired` and `unpaired`."""
Verdict = Literal["better", "worse", "tied", "too_few"]

MIN_PAIRS = 10
"""The fewest pairs for a verdict. Without pairs, twice as many independent episodes are needed on each side.

With 5 pairs the exact McNemar test cannot give p < 0.05, whatever the outcomes. From 10 pairs on, the tests keep their
error rate in simulations with skewed returns: `python -m tests.evaluation.coverage`. Welch's test needs more values,
because the skewness of two sides of different sizes does not cancel as in pairs.
"""
_DRAWS = 10_000
_ROUNDING = 1e-12  # values that vary less than this, relative to their size, are equal


@dataclass(frozen=True, slots=True)
class Comparison:
    """A policy compared with a baseline.

    `pairs` is 0 if the comparison is unpaired. `units` is the number of pairs, or else the number of independent
    episodes (clusters) on the side that has fewer. `delta` is None if a side has no values. The interval and `p` are
    None for fewer than two units.
    """

    pairs: int
    units: int
    delta: float | None
    low: float | None
    high: float | None
    p: float | None
    method: Method


def paired(a: Floats, b: Floats, level: float = 0.95, *, kind: Kind) -> Comparison:
    """Compares values in pairs: `a[i]` and `b[i]` are the results of one task.

    - Returns: the paired t test with its interval (`paired_t`).
    - Completions that are all 0 or 1: the exact McNemar test (`mcnemar_exact`) with Bonett and Price's interval.
    - Completions that are averages over several plays: a bootstrap of the pairs gives the interval and the p-value
      (`paired_bootstrap`), for up to `MAX_BOOTSTRAPPED` pairs. For more, the paired t test (`paired_t`).
    - Differences that are all equal: the exact test of their signs (`permutation`). The interval has the width 0.
    """
    n, differences = len(a), a - b
    if n < 2:
        return Comparison(n, n, float(differences[0]) if n else None, None, None, None, "paired_t")
    if kind == "completion" and _binary(a) and _binary(b):
        return _mcnemar(differences, level)
    delta, size = float(np.mean(differences)), _size(a, b)
    if np.ptp(differences) <= size:
        p = 1.0 if abs(delta) <= size else sign_test(n, n)
        return Comparison(n, n, delta, delta, delta, p, "permutation")
    if kind == "completion" and n <= MAX_BOOTSTRAPPED:
        return _bootstrapped(differences, level)
    return Comparison(n, n, delta, *_t(delta, standard_error(differences)[0], n - 1, level), "paired_t")


def unpaired(
    a: Floats,
    b: Floats,
    a_clusters: Labels | None = None,
    b_clusters: Labels | None = None,
    level: float = 0.95,
    *,
    kind: Kind,
) -> Comparison:
    """Compares the results of different tasks: Welch's t test with cluster-robust standard errors (`welch`).

    - The interval of a difference of returns is Welch's. That of completions is Newcombe's, from the Wilson intervals
      of the two rates.
    - If neither side varies: a permutation test (`permutation`). The interval of returns has the width 0.
    """
    (error_a, num_a), (error_b, num_b) = _side(a, a_clusters), _side(b, b_clusters)
    units = min(num_a, num_b)
    delta = float(np.mean(a) - np.mean(b)) if units else None
    if units < 2 or delta is None:
        return Comparison(0, units, delta, None, None, None, "welch")
    method: Method = "welch"
    error = sqrt(error_a**2 + error_b**2)
    if error <= _size(a, b):
        p = 1.0 if abs(delta) <= _size(a, b) else permutation_test(num_a, num_b)
        low, high, method = delta, delta, "permutation"
    else:
        degrees = error**4 / (error_a**4 / (num_a - 1) + error_b**4 / (num_b - 1))
        low, high, p = _t(delta, error, degrees, level)
    if kind == "completion" and _binary(a) and _binary(b):
        low, high = _newcombe(a, b, a_clusters, b_clusters, level)
    return Comparison(0, units, delta, low, high, p, method)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for their number by Holm's step-down method. None stays None and does not count.

    With adjusted values, the probability of any false finding among all comparisons is at most 1 - level.
    S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Statist. 6 (1979), 65-70.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    reached = 0.0
    for rank, (p, index) in enumerate(known):
        reached = max(reached, min(1.0, p * (len(known) - rank)))
        adjusted[index] = reached
    return adjusted


def verdict(
    comparison: Comparison, p_adjusted: float | None, level: float = 0.95, min_pairs: int = MIN_PAIRS
) -> Verdict:
    """Whether the policy is better or worse than the baseline.

    `tied` means that the data does not show a difference, and not that there is none.
    """
    fewest = min_pairs if comparison.pairs else 2 * min_pairs
    if comparison.units < fewest or comparison.delta is None or p_adjusted is None:
        return "too_few"
    if p_adjusted >= 1 - level:
        return "tied"
    return "better" if comparison.delta > 0 else "worse"


def _mcnemar(differences: Floats, level: float) -> Comparison:
    """Q. McNemar, Psychometrika 12 (1947), 153-157, exact: the discordant pairs are throws of a fair coin.

    The interval adds one pair of each discordant kind: D. G. Bonett and R. M. Price, "Adjusted Wald Confidence Interval
    for a Difference of Binomial Proportions Based on Paired Data", J. Educ. Behav. Stat. 37 (2012), 479-488. With few
    discordant pairs it keeps its level, unlike a bootstrap, which has the width 0 if there are none.
    """
    n, wins, losses = len(differences), int(np.sum(differences > 0)), int(np.sum(differences < 0))
    win, lose = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = normal_quantile((1 + level) / 2) * sqrt((win + lose - (win - lose) ** 2) / (n + 2))
    low, high = max(-1.0, win - lose - half), min(1.0, win - lose + half)
    return Comparison(n, n, (wins - losses) / n, low, high, sign_test(wins, wins + losses), "mcnemar_exact")


def _bootstrapped(differences: Floats, level: float) -> Comparison:
    n = len(differences)
    means = np.concatenate([counts @ differences for counts in resampled(n, n, _DRAWS, seed=0)]) / n
    interval, p = expanded_interval(means, n, level), expanded_p(means, n)
    return Comparison(n, n, float(np.mean(differences)), *interval, p, "paired_bootstrap")


def _newcombe(a: Floats, b: Floats, a_clusters: Labels | None, b_clusters: Labels | None, level: float) -> Interval:
    """The interval of a difference of two rates from their Wilson intervals, which may be clustered.

    R. G. Newcombe, "Interval Estimation for the Difference Between Independent Proportions: Comparison of Eleven
    Methods", Statistics in Medicine 17 (1998), 873-890, method 10.
    """
    rate_a, rate_b = float(np.mean(a)), float(np.mean(b))
    low_a, high_a = wilson(rate_a, effective_size(a > 0, a_clusters, level), level)
    low_b, high_b = wilson(rate_b, effective_size(b > 0, b_clusters, level), level)
    low = rate_a - rate_b - sqrt((rate_a - low_a) ** 2 + (high_b - rate_b) ** 2)
    return Interval(low, rate_a - rate_b + sqrt((high_a - rate_a) ** 2 + (rate_b - low_b) ** 2))


def _t(delta: float, error: float, degrees: float, level: float) -> tuple[float, float, float]:
    """The interval and the p-value of Student's t."""
    half = error * t_quantile((1 + level) / 2, degrees)
    return delta - half, delta + half, t_test(delta / error, degrees)


def _side(values: Floats, clusters: Labels | None) -> tuple[float, int]:
    return standard_error(values, clusters) if len(values) else (0.0, 0)


def _size(a: Floats, b: Floats) -> float:
    """The largest difference that may be a rounding error."""
    return _ROUNDING * float(max(np.max(np.abs(a)), np.max(np.abs(b))))


def _binary(values: Floats) -> bool:
    return bool(np.all((values == 0) | (values == 1)))
