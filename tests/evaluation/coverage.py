"""`python -m tests.evaluation.coverage`: simulates how often the intervals contain the truth, and how often a verdict
is wrong. Prints two tables. A share outside of its target is marked with `!`."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from tests.evaluation.simulations import COVERAGE, FALSE_POSITIVES, Coverage, FalsePositives


def table(
    title: str,
    simulations: Sequence[Coverage | FalsePositives],
    sizes: Sequence[int],
    is_good: Callable[[float], bool],
    draws: int,
    seed: int,
) -> None:
    """Prints the table as Markdown, each row as soon as it is simulated."""
    sys.stdout.write(f"| {title} | {' | '.join(f'n = {size}' for size in sizes)} |\n|---{'|---' * len(sizes)}|\n")
    for simulation in simulations:
        shares = [simulation.share(size, draws, seed) for size in sizes]
        cells = [f"{share:.1%}{'' if is_good(share) else ' !'}" for share in shares]
        sys.stdout.write(f"| {simulation.name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()
    sys.stdout.write("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("error")
    drawn = f"{given.draws} draws, seed {given.seed}"
    table(
        f"coverage of 95% intervals ({drawn})",
        COVERAGE,
        (20, 100, 1000),
        lambda share: 0.93 <= share <= 0.97,
        given.draws,
        given.seed,
    )
    table(
        f"wrong verdicts without a difference ({drawn})",
        FALSE_POSITIVES,
        (10, 20, 100),
        lambda share: share <= 0.06,
        given.draws,
        given.seed,
    )


if __name__ == "__main__":
    main()
