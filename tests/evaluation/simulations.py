"""Simulated episodes with a known truth, for the coverage of the intervals and the error rate of the verdicts.

A simulation draws a sample of a size from a random generator, and calls the function under test. The size is the number
of independent values: episodes, pairs, or clusters of PER_CLUSTER episodes. Skewed returns are those of a Beta(0.5, 2)
distribution: between 0 and 1, with mean 0.2 and skewness 1.25.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from service.evaluation import statistics
from service.evaluation.statistics import Comparison, InterquartileMean, Mean, Rate

Random = np.random.Generator
Sample = Callable[[Random, int], np.ndarray]
Compare = Callable[[Random, int], Comparison]

PER_CLUSTER = 4
SKEWED_MEAN = 0.2
SKEWED_IQM = float(np.mean(betaincinv(0.5, 2, np.linspace(0.25, 0.75, 100_001))))


@dataclass(frozen=True)
class Coverage:
    """How often an interval contains the truth."""

    name: str
    truth: float
    estimate: Callable[[Random, int], Rate | Mean | InterquartileMean | Comparison]

    def share(self, size: int, draws: int, seed: int = 0) -> float:
        """The share of `draws` samples whose interval contains the truth."""
        generator = np.random.default_rng([seed, size])
        estimates = [self.estimate(generator, size) for _ in range(draws)]
        low, high = np.array([(estimate.low, estimate.high) for estimate in estimates], float).T
        return float(np.mean((low <= self.truth + 1e-12) & (self.truth - 1e-12 <= high)))


@dataclass(frozen=True)
class FalsePositives:
    """How often a verdict is `better` or `worse` though the policies do not differ."""

    name: str
    compare: Compare
    family: int = 1
    """The number of policies that are compared with their baseline at once. One wrong verdict is an error."""

    def share(self, size: int, draws: int, seed: int = 0) -> float:
        """The share of `draws` families with a wrong verdict."""
        generator = np.random.default_rng([seed, size])
        return sum(self._wrong(generator, size) for _ in range(draws)) / draws

    def _wrong(self, generator: Random, size: int) -> bool:
        comparisons = [self.compare(generator, size) for _ in range(self.family)]
        adjusted = statistics.holm([comparison.p for comparison in comparisons])
        verdicts = map(statistics.verdict, comparisons, adjusted)
        return any(verdict in ("better", "worse") for verdict in verdicts)


# --- samples


def normal(generator: Random, size: int) -> np.ndarray:
    return generator.normal(size=size)


def skewed(generator: Random, size: int) -> np.ndarray:
    return generator.beta(0.5, 2, size)


def clustered(sample: Sample) -> Sample:
    """Each value is the mean of one that its cluster shares and one of its own: the intraclass correlation is 0.5."""

    def draw(generator: Random, size: int) -> np.ndarray:
        return (np.repeat(sample(generator, size), PER_CLUSTER) + sample(generator, size * PER_CLUSTER)) / 2

    return draw


def labels(size: int) -> np.ndarray:
    return np.repeat(np.arange(size), PER_CLUSTER)


def task_rates(generator: Random, size: int, mean: float) -> np.ndarray:
    """The success rates of tasks. Some tasks are easy and some hard: the intraclass correlation is 0.33."""
    return generator.beta(2 * mean, 2 * (1 - mean), size)


# --- intervals


def rate(true: float) -> Coverage:
    return Coverage(f"rate {true:g}", true, lambda generator, size: statistics.rate(generator.random(size) < true))


def clustered_rate(true: float) -> Coverage:
    def estimate(generator: Random, size: int) -> Rate:
        rates = np.repeat(task_rates(generator, size, true), PER_CLUSTER)
        return statistics.rate(generator.random(len(rates)) < rates, labels(size))

    return Coverage(f"rate {true:g}, clustered", true, estimate)


def mean(name: str, true: float, sample: Sample) -> Coverage:
    return Coverage(f"mean, {name}", true, lambda generator, size: statistics.mean(sample(generator, size)))


def clustered_mean(name: str, true: float, sample: Sample) -> Coverage:
    return Coverage(
        f"mean, {name}, clustered",
        true,
        lambda generator, size: statistics.mean(clustered(sample)(generator, size), labels(size)),
    )


def iqm(name: str, true: float, sample: Sample) -> Coverage:
    return Coverage(
        f"interquartile mean, {name}",
        true,
        lambda generator, size: statistics.interquartile_mean(sample(generator, size)),
    )


def clustered_iqm(name: str, true: float, sample: Sample) -> Coverage:
    return Coverage(
        f"interquartile mean, {name}, clustered",
        true,
        lambda generator, size: statistics.interquartile_mean(clustered(sample)(generator, size), labels(size)),
    )


# --- comparisons. The policies of each do not differ, unless `gain` or `loss` says how they do.


def paired_returns(gain: float = 0.0) -> Compare:
    """The returns of both policies depend on the task, and each varies by itself. `gain` is a mean, and skewed."""

    def compare(generator: Random, size: int) -> Comparison:
        task = skewed(generator, size)
        a, b = (task + skewed(generator, size) for _ in range(2))
        return statistics.paired(a + gain / SKEWED_MEAN * skewed(generator, size), b, kind="return")

    return compare


def rare_rewards(generator: Random, size: int) -> Comparison:
    """The return is 1 in a tenth of the episodes and 0 in the others."""
    a, b = ((generator.random(size) < 0.1).astype(float) for _ in range(2))
    return statistics.paired(a, b, kind="return")


def paired_completions(mean: float, *, loss: float = 0.0, plays: int = 1) -> Compare:
    """The policy completes tasks at the mean rate `mean`. The baseline fails in the share `loss` of these cases."""

    def compare(generator: Random, size: int) -> Comparison:
        rates = task_rates(generator, size, mean)
        a, b = (generator.binomial(plays, rates * kept) / plays for kept in (1, 1 - loss))
        return statistics.paired(a, b, kind="completion")

    return compare


def unpaired_returns(times: int = 1) -> Compare:
    """The baseline has `times` as many episodes as the policy."""

    def compare(generator: Random, size: int) -> Comparison:
        return statistics.unpaired(skewed(generator, size), skewed(generator, size * times), kind="return")

    return compare


def unpaired_completions(a: float, b: float) -> Compare:
    def compare(generator: Random, size: int) -> Comparison:
        sides = ((generator.random(size) < rate).astype(float) for rate in (a, b))
        return statistics.unpaired(*sides, kind="completion")

    return compare


def clustered_completions(a: float, b: float) -> Compare:
    def compare(generator: Random, size: int) -> Comparison:
        rates = (np.repeat(task_rates(generator, size, mean), PER_CLUSTER) for mean in (a, b))
        sides = ((generator.random(len(rate)) < rate).astype(float) for rate in rates)
        return statistics.unpaired(*sides, labels(size), labels(size), kind="completion")

    return compare


COVERAGE = (
    *(rate(true) for true in (0.5, 0.2, 0.1, 0.05)),
    *(clustered_rate(true) for true in (0.5, 0.2, 0.1)),
    mean("normal", 0.0, normal),
    mean("skewed", SKEWED_MEAN, skewed),
    clustered_mean("normal", 0.0, normal),
    clustered_mean("skewed", SKEWED_MEAN, skewed),
    iqm("normal", 0.0, normal),
    iqm("skewed", SKEWED_IQM, skewed),
    clustered_iqm("normal", 0.0, normal),
    Coverage("paired returns", 0.1, paired_returns(0.1)),
    Coverage("paired completions 0.7 and 0.49", 0.21, paired_completions(0.7, loss=0.3)),
    Coverage("paired completions 0.9 and 0.855", 0.045, paired_completions(0.9, loss=0.05)),
    Coverage("paired completions, averages of 4", 0.21, paired_completions(0.7, loss=0.3, plays=4)),
    Coverage("unpaired returns", 0.0, unpaired_returns()),
    Coverage("unpaired completions 0.7 and 0.5", 0.2, unpaired_completions(0.7, 0.5)),
    Coverage("unpaired completions 0.95 and 0.9", 0.05, unpaired_completions(0.95, 0.9)),
    Coverage("unpaired completions, clustered", 0.2, clustered_completions(0.7, 0.5)),
)

FALSE_POSITIVES = (
    FalsePositives("paired returns", paired_returns()),
    FalsePositives("paired returns, 5 policies", paired_returns(), 5),
    FalsePositives("paired returns, rare rewards", rare_rewards),
    FalsePositives("paired completions", paired_completions(0.7)),
    FalsePositives("paired completions, averages of 4", paired_completions(0.7, plays=4)),
    FalsePositives("paired completions, averages of 4, rare", paired_completions(0.1, plays=4)),
    FalsePositives("unpaired returns", unpaired_returns()),
    FalsePositives("unpaired returns, 10 times as many of the baseline", unpaired_returns(10)),
    FalsePositives("unpaired completions 0.5", unpaired_completions(0.5, 0.5)),
    FalsePositives("unpaired completions 0.9", unpaired_completions(0.9, 0.9)),
    FalsePositives("unpaired completions, clustered", clustered_completions(0.7, 0.7)),
)
