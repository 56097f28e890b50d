"""Success over several tries of one task: pass@k (at least one of k succeeds) and pass^k (all of k succeed)."""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def pass_at_k(n: Counts, c: Counts, k: int) -> float | None:
    """The probability that at least one of k tries succeeds: the mean of 1 - C(n - c, k) / C(n, k) over the tasks.

    `n` is the number of tries of each task, and `c` the number of its successes. The estimate is unbiased. Tasks with
    fewer than k tries are left out, and without any other task the result is None.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
    """
    none_succeeds = pass_all_k(n, n - c, k)
    return None if none_succeeds is None else 1 - none_succeeds


def pass_all_k(n: Counts, c: Counts, k: int) -> float | None:
    """The probability that all of k tries succeed (pass^k): the mean of C(c, k) / C(n, k) over the tasks.

    See `pass_at_k`. Yao et al. 2024, "tau-bench: A Benchmark for Tool-Agent-User Interaction in Real-World Domains",
    arXiv 2406.12045.
    """
    enough = n >= k
    if not enough.any():
        return None
    tries, successes = n[enough], c[enough]
    chance = np.ones(len(tries))
    for drawn in range(k):  # a product of factors of at most 1 cannot overflow, unlike binomial coefficients
        chance *= np.maximum(successes - drawn, 0) / (tries - drawn)
    return float(np.mean(chance))
