"""A part of the simulations of `python -m tests.evaluation.coverage`."""

import pytest

from tests.evaluation.simulations import COVERAGE, FALSE_POSITIVES, Coverage, FalsePositives

BOOTSTRAPPED = ("interquartile", "averages")
"""What is slow to simulate has fewer draws here, and fewer values."""
FAST = [each for each in COVERAGE if not any(word in each.name for word in BOOTSTRAPPED)]
SLOW = [each for each in COVERAGE if each not in FAST]
TESTS = [each for each in FALSE_POSITIVES if not any(word in each.name for word in BOOTSTRAPPED)]


@pytest.mark.parametrize("simulation", FAST, ids=lambda simulation: simulation.name)
def test_intervals_of_95_percent_contain_the_truth(simulation: Coverage) -> None:
    # With 5 expected successes in 100 trials, Wilson's interval contains the truth in 96.6% of the samples.
    most = 0.98 if simulation.name == "rate 0.05" else 0.97
    assert 0.93 <= simulation.share(100, draws=2000) <= most


@pytest.mark.parametrize("simulation", SLOW, ids=lambda simulation: simulation.name)
def test_bootstrapped_intervals_contain_the_truth(simulation: Coverage) -> None:
    assert 0.92 <= simulation.share(20, draws=400) <= 0.98


@pytest.mark.parametrize("simulation", TESTS, ids=lambda simulation: simulation.name)
def test_verdicts_are_seldom_wrong(simulation: FalsePositives) -> None:
    assert simulation.share(100, draws=2000 // simulation.family) <= 0.065
