"""95% confidence intervals of a rate (Wilson) and of a mean (Student's t)."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev

Interval = tuple[float, float]

_Z = NormalDist().inv_cdf(0.975)


def wilson(num_successes: int, num_trials: int) -> Interval:
    """Wilson's score interval of a rate. Unlike the normal approximation, it is also valid near 0 and 1.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927), 209-212.
    """
    rate = num_successes / num_trials
    shrink = 1 + _Z**2 / num_trials
    center = (rate + _Z**2 / (2 * num_trials)) / shrink
    half = _Z / shrink * sqrt(rate * (1 - rate) / num_trials + _Z**2 / (4 * num_trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean. None for fewer than two values."""
    if len(values) < 2:
        return None
    half = student_t(len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def student_t(degrees: int) -> float:
    """The 97.5% quantile of Student's t distribution, approximated by its expansion in 1/degrees.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5. The error is within 1% from 3 degrees of
    freedom up. Below, the result is too small (9.7 instead of 12.7 at one degree of freedom).
    """
    z = _Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
