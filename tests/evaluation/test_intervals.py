"""The intervals against scipy, statsmodels and published values."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import t, trim_mean
from statsmodels.stats.proportion import proportion_confint

from service.evaluation.bootstrap import MAX_BOOTSTRAPPED, expanded_interval, resampled
from service.evaluation.intervals import (
    Mean,
    Rate,
    effective_size,
    interquartile_mean,
    mean,
    rate,
    standard_error,
    wilson,
)


def trials(successes: int, n: int) -> np.ndarray:
    return np.arange(n) < successes


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(7)


# --- rates


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # 15 of 148 and 81 of 263: R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
    [(15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(successes: int, n: int, low: float, high: float) -> None:
    found = rate(trials(successes, n))
    assert (found.rate, found.low, found.high, found.n) == pytest.approx((successes / n, low, high, n), abs=5e-5)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 10), (500, 1000)])
def test_wilson_against_statsmodels(successes: int, n: int, level: float) -> None:
    expected = proportion_confint(successes, n, 1 - level, method="wilson")
    found = rate(trials(successes, n), level=level)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)
    assert found.low >= 0
    assert found.high <= 1


def test_clusters_of_one_value_are_no_clusters(generator: np.random.Generator) -> None:
    values = generator.normal(size=30)
    alone = generator.permutation(30)
    assert effective_size(values > 0, alone) == pytest.approx(30)
    assert standard_error(values, alone) == pytest.approx(standard_error(values))


def test_the_effective_size_of_equal_forks_is_the_number_of_clusters(generator: np.random.Generator) -> None:
    outcomes = generator.random(500) < 0.3
    size = effective_size(np.repeat(outcomes, 10), np.repeat(np.arange(500), 10))
    assert size == pytest.approx(500, rel=0.01)
    found = rate(np.repeat(outcomes, 10), np.repeat(np.arange(500), 10))
    assert (found.low, found.high) == pytest.approx(wilson(float(outcomes.mean()), 500), rel=0.01)


def test_few_clusters_make_the_effective_size_smaller() -> None:
    outcomes = np.array([1, 1, 1, 0, 0, 1, 0, 0], bool)
    clusters = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    # The clusters deviate by +1 and -1 from half of 4: the standard error is sqrt(2 * (1 + 1)) / 8.
    # Independent values have sqrt(8 / 7 * 8 / 4) / 8.
    expected = 8 * (np.sqrt(16 / 7 / 4) * t.ppf(0.975, 7) / t.ppf(0.975, 1)) ** 2
    assert effective_size(outcomes, clusters) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("outcome", [True, False])
def test_if_all_succeed_or_fail_each_cluster_counts_once(outcome: bool) -> None:
    found = rate(np.full(40, outcome), np.repeat(np.arange(10), 4))
    assert (found.low, found.high) == pytest.approx(wilson(float(outcome), 10))


def test_clusters_that_balance_each_other_do_not_add_information() -> None:
    outcomes, clusters = np.tile([True, False], 50), np.repeat(np.arange(50), 2)
    assert 90 < effective_size(outcomes, clusters) <= 100


def test_a_single_cluster_counts_as_one_trial() -> None:
    outcomes = np.array([True, False, True, True])
    found = rate(outcomes, np.zeros(4, int))
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 1))


def test_no_values() -> None:
    assert rate(np.array([], bool)) == Rate(None, None, None, 0)
    assert mean(np.array([])) == Mean(None, None, None, None, None, None, 0)
    assert interquartile_mean(np.array([])).iqm is None


# --- means


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 20, 1000])
def test_the_mean_against_scipy(generator: np.random.Generator, n: int, level: float) -> None:
    values = generator.exponential(size=n)
    found = mean(values, level=level)
    expected = t.interval(level, n - 1, values.mean(), values.std(ddof=1) / np.sqrt(n))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.mean, found.sd) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert (found.min, found.max, found.n) == (values.min(), values.max(), n)


def test_the_clustered_mean_against_statsmodels(generator: np.random.Generator) -> None:
    clusters = generator.integers(0, 12, 80)
    values = generator.normal(size=12)[clusters] + generator.normal(size=80)
    fitted = sm.OLS(values, np.ones(80)).fit(cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": True})
    # statsmodels also multiplies the variance by (n - 1) / (n - 1) for a model with one parameter: nothing to undo.
    error, num_clusters = standard_error(values, clusters)
    assert num_clusters == 12
    assert error == pytest.approx(float(fitted.bse[0]))
    found = mean(values, np.array([f"episode {cluster}" for cluster in clusters]))
    half = t.ppf(0.975, 11) * float(fitted.bse[0])
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_one_value_or_one_cluster_has_no_interval() -> None:
    one = mean(np.array([3.0]))
    assert one == Mean(3.0, None, None, None, 3.0, 3.0, 1)
    forks = mean(np.array([1.0, 2.0]), np.array([5, 5]))
    assert (forks.mean, forks.low, forks.high) == (1.5, None, None)
    assert forks.sd == pytest.approx(np.sqrt(0.5))


def test_equal_values_have_an_interval_of_the_width_0() -> None:
    found = mean(np.full(10, 0.5))
    assert (found.mean, found.low, found.high, found.sd) == (0.5, 0.5, 0.5, 0.0)


# --- interquartile means


@pytest.mark.parametrize("n", [4, 20, 400, 2000])
def test_the_interquartile_mean_against_scipy(generator: np.random.Generator, n: int) -> None:
    values = generator.exponential(size=n)
    assert interquartile_mean(values, draws=10).iqm == pytest.approx(trim_mean(values, 0.25))


@pytest.mark.parametrize(
    ("values", "iqm"),
    [
        ([5], 5),
        ([1, 2], 1.5),
        ([0, 1, 5], (0.25 * 0 + 1 + 0.25 * 5) / 1.5),
        ([9, 0, 1, 2, 3], (0.75 * 1 + 2 + 0.75 * 3) / 2.5),
        ([0, 1, 2, 3, 4, 50], (0.5 * 1 + 2 + 3 + 0.5 * 4) / 3),
    ],
)
def test_values_at_the_edges_count_in_part(values: list[float], iqm: float) -> None:
    assert interquartile_mean(np.array(values, float)).iqm == pytest.approx(iqm)


def test_the_bootstrap_of_an_interquartile_mean(generator: np.random.Generator) -> None:
    values = generator.exponential(size=80)
    resamples = generator.choice(values, (2000, 80))
    expected = expanded_interval(trim_mean(resamples, 0.25, axis=1), 80)
    found = interquartile_mean(values)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.02)
    assert found == interquartile_mean(values[::-1]), "the interval depends on the values alone"
    assert found != interquartile_mean(values, seed=1)


def test_the_bootstrap_draws_clusters(generator: np.random.Generator) -> None:
    values = generator.exponential(size=60)
    forked = interquartile_mean(np.repeat(values, 5), np.repeat(np.arange(60), 5))
    alone = interquartile_mean(values)
    assert forked.iqm == pytest.approx(alone.iqm)
    assert (forked.low, forked.high) == pytest.approx((alone.low, alone.high), abs=0.05)
    assert interquartile_mean(values, np.zeros(60)).low is None


@pytest.mark.parametrize("per_cluster", [1, 5])
def test_beyond_the_bootstrap_its_limit_is_used(generator: np.random.Generator, per_cluster: int) -> None:
    n = MAX_BOOTSTRAPPED + 5 - MAX_BOOTSTRAPPED % 5
    values = np.repeat(generator.exponential(size=n // per_cluster), per_cluster) + generator.exponential(size=n)
    clusters = np.repeat(np.arange(n // per_cluster), per_cluster)
    found = interquartile_mean(values, clusters)
    picked = generator.integers(n // per_cluster, size=(2000, n // per_cluster))
    drawn = values.reshape(-1, per_cluster)[picked].reshape(2000, n)
    low, high = expanded_interval(trim_mean(drawn, 0.25, axis=1), n // per_cluster)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_each_draw_takes_as_many_clusters_as_there_are() -> None:
    counts = np.concatenate(list(resampled(300, 900, 1000, seed=0)))
    assert counts.shape == (1000, 300)
    assert (counts.sum(axis=1) == 300).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(300), abs=0.2)


@pytest.mark.parametrize("n", [MAX_BOOTSTRAPPED, 100_000])
def test_statistics_use_little_memory(generator: np.random.Generator, n: int) -> None:
    values, clusters = generator.normal(size=n), np.repeat(np.arange(n // 4), 4)
    rate(values > 0, clusters)  # imports scipy
    tracemalloc.start()
    rate(values > 0, clusters)
    mean(values, clusters)
    interquartile_mean(values, clusters)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25e6


# --- imports


def test_scipy_is_imported_only_for_a_computation() -> None:
    code = (
        "import sys, service.app, service.cli.main; print('scipy' in sys.modules)\n"
        "from service.evaluation import statistics; import numpy as np\n"
        "statistics.mean(np.array([1.0, 2.0])); print('scipy' in sys.modules, 'scipy.stats' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "True", "False"]
