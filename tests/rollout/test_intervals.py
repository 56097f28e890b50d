"""The confidence intervals against published values."""

import pytest

from service.rollout.intervals import mean_interval, student_t, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # 15 of 148 and 81 of 263: R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
    [(15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("degrees", "quantile"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (199, 1.972)])
def test_student_t_against_the_usual_table(degrees: int, quantile: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, rel=0.01)


def test_the_interval_of_a_mean() -> None:
    # Standard deviation 1.5811, 5 values, t = 2.776: 3 -+ 1.963.
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((1.037, 4.963), abs=0.01)
    assert mean_interval([1.0]) is None
