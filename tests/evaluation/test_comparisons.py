"""The comparisons against scipy, statsmodels and published values."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import fisher_exact, norm, t, ttest_ind, ttest_rel, wilcoxon
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep

from service.evaluation.bootstrap import MAX_BOOTSTRAPPED
from service.evaluation.comparisons import MIN_PAIRS, Comparison, Verdict, holm, paired, unpaired, verdict


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(11)


def pairs(both: int, wins: int, losses: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """The completions of a policy and of its baseline, for these numbers of pairs."""
    counts = (both, wins, losses, neither)
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


def completions(successes: int, n: int) -> np.ndarray:
    return (np.arange(n) < successes).astype(float)


# --- pairs


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [2, 10, 700])
def test_paired_returns_against_scipy(generator: np.random.Generator, n: int, level: float) -> None:
    a, b = generator.exponential(size=(2, n))
    found, expected = paired(a, b, level, kind="return"), ttest_rel(a, b)
    interval = expected.confidence_interval(level)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert found.delta == pytest.approx(a.mean() - b.mean())
    assert (found.pairs, found.units, found.method) == (n, n, "paired_t")


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 12), (9, 9), (40, 70)])
def test_paired_completions_against_statsmodels(wins: int, losses: int) -> None:
    found = paired(*pairs(20, wins, losses, 5), kind="completion")
    assert found.p == pytest.approx(mcnemar([[20, wins], [losses, 5]], exact=True).pvalue)
    assert found.delta == pytest.approx((wins - losses) / (25 + wins + losses))
    assert found.method == "mcnemar_exact"


def test_the_interval_of_paired_completions_against_published_values() -> None:
    # The R package statpsych 1.7.0: ci.prop.ps(.05, 12, 4, 26, 6).
    found = paired(*pairs(6, 26, 4, 12), kind="completion")
    assert (found.low, found.high) == pytest.approx((0.2548067, 0.6251933), abs=5e-8)
    assert found.delta == pytest.approx(22 / 48)


def test_an_interval_of_completions_is_a_possible_difference() -> None:
    found = paired(*pairs(0, 40, 0, 0), kind="completion")
    assert found.high == 1.0
    assert found.low == pytest.approx(0.83, abs=0.1)
    same = paired(*pairs(10, 0, 0, 10), kind="completion")
    assert (same.delta, same.p) == (0.0, 1.0)
    assert same.low == pytest.approx(-same.high)
    assert same.high > 0.05, "no discordant pair does not mean that the difference is known"


def test_averages_of_completions_against_a_bootstrap(generator: np.random.Generator) -> None:
    a, b = generator.binomial(4, 0.6, 40) / 4, generator.binomial(4, 0.5, 40) / 4
    found = paired(a, b, kind="completion")
    drawn = generator.choice(a - b, (20_000, 40)).mean(axis=1)
    tail = norm.cdf(-t.ppf(0.975, 39) * np.sqrt(40 / 39))
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), abs=0.01)
    assert found.p == pytest.approx(ttest_rel(a, b).pvalue, abs=0.02)
    assert found.method == "paired_bootstrap"
    assert found == paired(a, b, kind="completion")
    many = paired(np.resize(a, MAX_BOOTSTRAPPED + 1), np.resize(b, MAX_BOOTSTRAPPED + 1), kind="completion")
    assert many.method == "paired_t"


@pytest.mark.parametrize("seed", range(20))
def test_the_p_value_and_the_interval_of_a_bootstrap_agree(seed: int) -> None:
    a, b = np.random.default_rng(seed).binomial(4, [[0.65], [0.45]], (2, 15)) / 4
    found = paired(a, b, kind="completion")
    p, low, high = found.p, found.low, found.high
    assert p is not None
    assert low is not None
    assert high is not None
    if abs(p - 0.05) > 0.005:
        assert (p < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("kind", ["completion", "return"])
def test_equal_differences_do_not_divide_by_zero(kind: str) -> None:
    b = np.linspace(0.1, 0.7, 12)
    found = paired(b + 0.2, b, kind=kind)
    assert (found.delta, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert found.p == pytest.approx(2 * 0.5**12)
    assert found.p == pytest.approx(wilcoxon(np.arange(1, 13), method="exact").pvalue)
    assert found.method == "permutation"
    assert paired(b, b, kind=kind).p == 1.0


@pytest.mark.parametrize("kind", ["completion", "return"])
def test_fewer_than_two_pairs_have_no_interval(kind: str) -> None:
    none = paired(np.array([]), np.array([]), kind=kind)
    assert (none.pairs, none.delta, none.p) == (0, None, None)
    one = paired(np.array([1.0]), np.array([0.5]), kind=kind)
    assert (one.pairs, one.delta, one.low, one.high, one.p) == (1, 0.5, None, None, None)


# --- without pairs


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize(("num_a", "num_b"), [(2, 2), (10, 300), (400, 500)])
def test_unpaired_returns_against_scipy(generator: np.random.Generator, num_a: int, num_b: int, level: float) -> None:
    a, b = generator.exponential(size=num_a), generator.exponential(2, num_b)
    found, expected = unpaired(a, b, level=level, kind="return"), ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(level)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert (found.pairs, found.units, found.method) == (0, num_a, "welch")


def test_unpaired_clusters_against_statsmodels(generator: np.random.Generator) -> None:
    clusters = np.repeat(np.arange(15), 4)
    a, b = (generator.normal(size=15)[clusters] + generator.normal(size=60) for _ in range(2))
    found = unpaired(a, b, clusters, clusters, kind="return")
    errors = [
        float(sm.OLS(side, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": clusters}).bse[0])
        for side in (a, b)
    ]
    error = np.hypot(*errors)
    degrees = error**4 / sum(side**4 / 14 for side in errors)
    assert found.p == pytest.approx(2 * t.sf(abs(a.mean() - b.mean()) / error, degrees))
    assert found.high == pytest.approx(a.mean() - b.mean() + error * t.ppf(0.975, degrees))
    assert found.units == 15


@pytest.mark.parametrize(("a", "b"), [((56, 70), (48, 80)), ((9, 10), (3, 10)), ((10, 10), (0, 20))])
def test_unpaired_completions_against_statsmodels(a: tuple[int, int], b: tuple[int, int]) -> None:
    found = unpaired(completions(*a), completions(*b), kind="completion")
    expected = confint_proportions_2indep(*a, *b, method="newcomb", compare="diff")
    assert (found.low, found.high) == pytest.approx(expected)


def test_without_variation_an_unpaired_comparison_permutes() -> None:
    found = unpaired(completions(6, 6), completions(0, 6), kind="completion")
    assert found.p == pytest.approx(fisher_exact([[6, 0], [0, 6]]).pvalue)
    assert found.method == "permutation"
    assert found.low is not None
    assert found.low < 1.0
    returns = unpaired(np.full(200, 0.3), np.full(100_000, 0.1 + 0.2), kind="return")
    assert returns.p == 1.0
    assert unpaired(np.full(200, 0.3), np.full(100_000, 0.5), kind="return").p == 0.0


@pytest.mark.parametrize("kind", ["completion", "return"])
def test_a_side_without_two_independent_episodes_has_no_interval(kind: str) -> None:
    some = completions(2, 4)
    none = unpaired(np.array([]), some, kind=kind)
    assert (none.units, none.delta, none.p) == (0, None, None)
    forks = unpaired(some, some, np.zeros(4), None, kind=kind)
    assert (forks.units, forks.delta, forks.low, forks.p) == (1, 0.0, None, None)


# --- several comparisons, and verdicts


@pytest.mark.parametrize(
    "p_values", [[0.01], [0.04, 0.03, 0.02, 0.01], [0.2, 0.01, 0.01, 0.6, 1.0], [0.0, 0.0, 0.9], [0.025, 0.025, 0.025]]
)
def test_holm_against_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


def test_holm_leaves_out_missing_p_values() -> None:
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]
    assert holm([]) == []


def compared(units: int, delta: float | None, *, pairs: bool = True) -> Comparison:
    return Comparison(units if pairs else 0, units, delta, None, None, None, "paired_t" if pairs else "welch")


@pytest.mark.parametrize(
    ("units", "delta", "p", "expected"),
    [
        (10, 0.2, 0.049, "better"),
        (10, -0.2, 0.049, "worse"),
        (10, 0.2, 0.051, "tied"),
        (9, 0.2, 0.0001, "too_few"),
        (3, 0.9, 0.0001, "too_few"),
        (0, None, None, "too_few"),
    ],
)
def test_the_verdict(units: int, delta: float | None, p: float | None, expected: Verdict) -> None:
    assert verdict(compared(units, delta), p) == expected


def test_without_pairs_a_verdict_needs_twice_as_many_episodes() -> None:
    assert verdict(compared(20, 0.2, pairs=False), 0.03) == "better"
    assert verdict(compared(19, 0.2, pairs=False), 0.03) == "too_few"


def test_the_level_and_the_minimum_of_a_verdict() -> None:
    assert verdict(compared(20, 0.2), 0.03, level=0.99) == "tied"
    assert verdict(compared(20, 0.2), 0.07, level=0.9) == "better"
    assert verdict(compared(20, 0.2), 0.03, min_pairs=21) == "too_few"


def test_three_episodes_are_too_few() -> None:
    found = paired(*pairs(0, 3, 0, 0), kind="completion")
    assert verdict(found, found.p) == "too_few"
    returns = paired(np.array([1.0, 1.1, 1.2]), np.array([0.0, 0.0, 0.1]), kind="return")
    assert returns.p is not None
    assert returns.p < 0.01
    assert verdict(returns, returns.p) == "too_few"


def test_fewer_pairs_than_the_minimum_can_hardly_show_a_difference() -> None:
    assert mcnemar([[0, 5], [0, 0]], exact=True).pvalue > 0.05
    assert mcnemar([[0, MIN_PAIRS], [0, 0]], exact=True).pvalue < 0.05
