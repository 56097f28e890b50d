"""Confidence intervals of a rate, a mean and an interquartile mean.

Episodes that depend on each other form a cluster: the forks of one episode, or several plays of one seed. `clusters`
gives the label of each value's cluster, and None means that all values are independent. The standard error with
clusters is that of E. Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640, times sqrt(C / (C - 1)) for C
clusters.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from service.evaluation.bootstrap import MAX_BOOTSTRAPPED, Floats, Interval, Labels, expanded_interval, resampled
from service.evaluation.distributions import normal_quantile, t_quantile


@dataclass(frozen=True, slots=True)
class Rate:
    """The share of successes in `n` values. None without values."""

    rate: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of `n` values. The interval is None for fewer than two clusters, and `sd` for fewer than two values."""

    mean: float | None
    low: float | None
    high: float | None
    sd: float | None
    min: float | None
    max: float | None
    n: int


@dataclass(frozen=True, slots=True)
class InterquartileMean:
    """The mean of the middle half of the values. The interval is None for fewer than two clusters."""

    iqm: float | None
    low: float | None
    high: float | None


def rate(successes: npt.NDArray[np.bool_], clusters: Labels | None = None, level: float = 0.95) -> Rate:
    """The share of successes with Wilson's score interval.

    With clusters, the number of trials in Wilson's formula is the effective sample size: see `effective_size`.
    """
    if not len(successes):
        return Rate(None, None, None, 0)
    share = float(np.mean(successes))
    return Rate(share, *wilson(share, effective_size(successes, clusters, level), level), len(successes))


def wilson(share: float, num_trials: float, level: float = 0.95) -> Interval:
    """Wilson's score interval of a rate. Unlike the normal approximation, it is also valid near 0 and 1.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927), 209-212.
    """
    z = normal_quantile((1 + level) / 2)
    shrink = 1 + z**2 / num_trials
    center = (share + z**2 / (2 * num_trials)) / shrink
    half = z / shrink * sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2))
    return Interval(0.0 if share == 0 else center - half, 1.0 if share == 1 else center + half)


def effective_size(successes: npt.NDArray[np.bool_], clusters: Labels | None, level: float = 0.95) -> float:
    """The number of independent trials that would give as much information about the rate as these clustered ones.

    It is n / deff * (t(n - 1) / t(C - 1))**2. The design effect deff is the cluster-robust variance of the rate divided
    by that of independent trials, and at least 1. The t quantiles account for the uncertainty of deff if there are few
    clusters. If all trials have the same outcome, deff is unknown and each cluster counts as one trial.

    E. L. Korn and B. I. Graubard, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", Survey Methodology 24 (1998), 193-201. C. Franco et al., "Comparative study of
    confidence intervals for proportions in complex sample surveys", J. Surv. Stat. Methodol. 7 (2019), 334-364.
    """
    n = len(successes)
    if clusters is None:
        return n
    values = successes.astype(np.float64)
    error, num_clusters = standard_error(values, clusters)
    independent, _ = standard_error(values)
    if num_clusters == 1 or not independent:
        return num_clusters
    quantile = (1 + level) / 2
    correction = t_quantile(quantile, n - 1) / t_quantile(quantile, num_clusters - 1)
    return n * (independent / max(error, independent) * correction) ** 2


def mean(values: Floats, clusters: Labels | None = None, level: float = 0.95) -> Mean:
    """The mean with Student's t interval: cluster-robust, with C - 1 degrees of freedom for C clusters."""
    n = len(values)
    if not n:
        return Mean(None, None, None, None, None, None, 0)
    center = float(np.mean(values))
    low, high = _t_interval(center, values, clusters, level)
    sd = float(np.std(values, ddof=1)) if n > 1 else None
    return Mean(center, low, high, sd, float(np.min(values)), float(np.max(values)), n)


def standard_error(values: Floats, clusters: Labels | None = None) -> tuple[float, int]:
    """The cluster-robust standard error of the mean, and the number of clusters. 0 for a single cluster."""
    deviations = values - np.mean(values)
    if clusters is not None:
        deviations = np.bincount(np.unique(clusters, return_inverse=True)[1], weights=deviations)
    count = len(deviations)
    if count < 2:
        return 0.0, count
    return sqrt(float(np.sum(deviations**2)) * count / (count - 1)) / len(values), count


def interquartile_mean(
    values: Floats, clusters: Labels | None = None, level: float = 0.95, *, draws: int = 2000, seed: int = 0
) -> InterquartileMean:
    """The mean of the middle half of the values (Agarwal et al. 2021, arXiv 2108.13264).

    The lowest and the highest quarter are left out. If the number of values is not divisible by 4, the values at the
    two edges count in part, so that exactly half of the values counts.

    The interval is a cluster bootstrap from `seed`: see `expanded_interval`. For more than `MAX_BOOTSTRAPPED` values it
    is the t interval of the influence function, which is twice the value clipped to the quartiles. The bootstrap
    converges to this interval (J. W. Tukey and D. H. McLaughlin, Sankhya A 25 (1963), 331-352).
    """
    n = len(values)
    if not n:
        return InterquartileMean(None, None, None)
    order = np.argsort(values, kind="stable")
    ordered, labels = values[order], np.arange(n)
    if clusters is not None:
        labels = np.unique(clusters, return_inverse=True)[1][order]
    num_clusters = int(np.max(labels)) + 1
    center = float(_middle_means(ordered, np.ones((1, n), np.int64))[0])
    if num_clusters == 1:
        return InterquartileMean(center, None, None)
    if n > MAX_BOOTSTRAPPED:
        clipped = np.clip(ordered, *np.quantile(ordered, (0.25, 0.75)))
        return InterquartileMean(center, *_t_interval(center, 2 * clipped, labels, level))
    drawn = [_middle_means(ordered, counts[:, labels]) for counts in resampled(num_clusters, n, draws, seed)]
    return InterquartileMean(center, *expanded_interval(np.concatenate(drawn), num_clusters, level))


def _middle_means(ordered: Floats, counts: npt.NDArray[np.int64]) -> Floats:
    """The interquartile mean of ordered values, for each row of counts of these values."""
    reached = np.cumsum(counts, axis=1, dtype=np.float64)
    quarter = reached[:, -1:] / 4
    inside = np.diff(np.clip(reached, quarter, 3 * quarter), axis=1, prepend=quarter)
    return inside @ ordered / (2 * quarter[:, 0])


def _t_interval(
    center: float, values: Floats, clusters: Labels | None, level: float
) -> tuple[float, float] | tuple[None, None]:
    """Student's t interval around `center`, with the standard error of the mean of `values`."""
    error, num_clusters = standard_error(values, clusters)
    if num_clusters < 2:
        return None, None
    half = error * t_quantile((1 + level) / 2, num_clusters - 1)
    return center - half, center + half
