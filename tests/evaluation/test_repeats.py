"""pass@k and pass^k against all subsets of the tries."""

from itertools import combinations

import numpy as np
import pytest

from service.evaluation.repeats import pass_all_k, pass_at_k


def over_subsets(tries: list[int], successes: list[int], k: int, combine) -> float:
    """The mean over the tasks of the share of subsets of k tries for which `combine` is true."""
    shares = []
    for n, c in zip(tries, successes, strict=True):
        outcomes = [True] * c + [False] * (n - c)
        shares.append(np.mean([combine(subset) for subset in combinations(outcomes, k)]))
    return float(np.mean(shares))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_and_pass_all_k_are_the_shares_of_subsets(k: int) -> None:
    tries, successes = [4, 5, 6, 7, 8], [0, 5, 1, 3, 6]
    n, c = np.array(tries), np.array(successes)
    assert pass_at_k(n, c, k) == pytest.approx(over_subsets(tries, successes, k, any))
    assert pass_all_k(n, c, k) == pytest.approx(over_subsets(tries, successes, k, all))


def test_tasks_with_fewer_tries_are_left_out() -> None:
    n, c = np.array([1, 1, 4]), np.array([1, 0, 2])
    assert pass_at_k(n, c, 2) == pytest.approx(5 / 6)
    assert pass_all_k(n, c, 2) == pytest.approx(1 / 6)
    assert pass_at_k(n, c, 5) is None
    assert pass_all_k(n, c, 5) is None


def test_many_tries_do_not_overflow() -> None:
    n, c = np.array([100_000]), np.array([50_000])
    assert pass_all_k(n, c, 10) == pytest.approx(0.5**10, rel=1e-3)
    assert pass_at_k(n, c, 5000) == 1.0
