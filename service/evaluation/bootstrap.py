"""The cluster bootstrap: resampling from a seed in bounded memory, its interval and its p-value."""

from collections.abc import Iterator
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.evaluation.distributions import normal_probability, normal_quantile, t_quantile, t_test

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[Any]
"""Labels of clusters: equal labels mean the same cluster."""

MAX_BOOTSTRAPPED = 500
"""For more values than this, the bootstrap is replaced by the t interval that it converges to."""
_CHUNK = 60_000  # values that are resampled at the same time: about 3 MB, which fits a cache


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def resampled(num_clusters: int, num_values: int, draws: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """How often each cluster is drawn, one row for each draw, in chunks of rows."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // num_values)
    for start in range(0, draws, rows):
        shape = (min(rows, draws - start), num_clusters)
        picked = generator.integers(num_clusters, size=shape) + num_clusters * np.arange(shape[0])[:, None]
        yield np.bincount(picked.ravel(), minlength=shape[0] * num_clusters).reshape(shape)


def expanded_interval(estimates: Floats, num_clusters: int, level: float = 0.95) -> Interval:
    """The expanded percentile interval of bootstrapped estimates.

    The percentile interval is too narrow if there are few clusters. Here its percentiles are as much wider as Student's
    t is wider than the normal distribution. T. C. Hesterberg, "What Teachers Should Know About the Bootstrap", The
    American Statistician 69 (2015), 371-386.
    """
    z = t_quantile((1 + level) / 2, num_clusters - 1) * sqrt(num_clusters / (num_clusters - 1))
    low, high = np.quantile(estimates, (normal_probability(-z), normal_probability(z)))
    return Interval(float(low), float(high))


def expanded_p(differences: Floats, num_clusters: int) -> float:
    """The p-value of "no difference": 1 minus the level at which `expanded_interval` begins to contain 0."""
    rounding = 1e-12 * float(np.max(np.abs(differences)))
    extreme = min(np.count_nonzero(differences <= rounding), np.count_nonzero(differences >= -rounding))
    z = normal_quantile(1 - min(0.5, (extreme + 1) / (len(differences) + 1)))
    return t_test(z * sqrt((num_clusters - 1) / num_clusters), num_clusters - 1)
