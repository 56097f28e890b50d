"""Quantiles and probabilities of the normal, Student's t and the binomial distribution.

scipy is imported inside the functions, so that commands that compute nothing start quickly. `scipy.special` is enough,
and it loads in a fraction of the time of `scipy.stats`.
"""

from math import exp, lgamma, log
from statistics import NormalDist


def normal_quantile(probability: float) -> float:
    """The quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def normal_probability(value: float) -> float:
    """The probability that a standard normal variable is at most `value`."""
    return NormalDist().cdf(value)


def t_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's t distribution with `degrees` degrees of freedom."""
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

    return float(stdtrit(degrees, probability))


def t_test(statistic: float, degrees: float) -> float:
    """The two-sided p-value of a t statistic."""
    from scipy.special import stdtr  # pyright: ignore[reportMissingTypeStubs]

    return 2 * float(stdtr(degrees, -abs(statistic)))


def sign_test(num_successes: int, num_trials: int) -> float:
    """The exact two-sided p-value of `num_successes` in `num_trials` throws of a fair coin. 1 without throws."""
    from scipy.special import bdtr  # pyright: ignore[reportMissingTypeStubs]

    fewer = min(num_successes, num_trials - num_successes)
    return min(1.0, 2 * float(bdtr(fewer, num_trials, 0.5)))


def permutation_test(num_a: int, num_b: int) -> float:
    """The exact two-sided p-value of a permutation test of two groups, each with a single value of its own."""
    log_splits = lgamma(num_a + num_b + 1) - lgamma(num_a + 1) - lgamma(num_b + 1)
    return min(1.0, exp(log(2) - log_splits))
