"""Krippendorff's alpha against published examples."""

import numpy as np
import pytest

from service.evaluation.agreement import Metric, krippendorff_alpha

# K. Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: four observers, twelve units.
FOUR_OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
# The computational example of the article "Krippendorff's alpha" in Wikipedia: three coders, fifteen units.
THREE_CODERS = """
. . . . . 3 4 1 2 1 1 3 3 . 3
1 . 2 1 3 3 4 3 . . . . . . .
. . 2 1 3 4 4 . 2 1 1 3 3 . 4
"""


def ratings(table: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The units, raters and ratings of a table with a row for each rater."""
    rows = [line.split() for line in table.strip().splitlines()]
    found = [
        (unit, f"r{rater}", float(cell))
        for rater, row in enumerate(rows)
        for unit, cell in enumerate(row)
        if cell != "."
    ]
    units, raters, values = zip(*found, strict=True)
    return np.array(units), np.array(raters), np.array(values)


@pytest.mark.parametrize(
    ("table", "metric", "alpha"),
    [
        (FOUR_OBSERVERS, "nominal", 0.743),
        (FOUR_OBSERVERS, "ordinal", 0.815),
        (FOUR_OBSERVERS, "interval", 0.849),
        (THREE_CODERS, "nominal", 0.691),
        (THREE_CODERS, "ordinal", 0.807),
        (THREE_CODERS, "interval", 0.811),
    ],
)
def test_published_examples(table: str, metric: Metric, alpha: float) -> None:
    assert krippendorff_alpha(*ratings(table), metric) == pytest.approx(alpha, abs=5e-4)


def test_the_last_rating_of_a_rater_counts() -> None:
    units, raters, values = ratings(THREE_CODERS)
    first = np.array([5.0])
    changed = krippendorff_alpha(np.append(units[:1], units), np.append(raters[:1], raters), np.append(first, values))
    assert changed == krippendorff_alpha(units, raters, values)
    assert (
        krippendorff_alpha(np.append(units, units[:1]), np.append(raters, raters[:1]), np.append(values, first))
        != changed
    )


@pytest.mark.parametrize(
    ("units", "raters", "values"),
    [
        ([], [], []),
        ([0, 1, 2], ["a", "a", "b"], [1, 2, 3]),
        ([0, 0], ["a", "a"], [1, 2]),
        ([0, 0, 1, 1], [*"abab"], [4] * 4),
    ],
)
def test_without_pairs_or_variation_there_is_no_alpha(units: list[int], raters: list[str], values: list[float]) -> None:
    assert krippendorff_alpha(np.array(units), np.array(raters), np.array(values, float)) is None


def test_agreement_by_chance_is_near_0_and_perfect_agreement_is_1() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(1, 6, (2, 2000)).astype(float)
    units, raters = np.tile(np.arange(2000), 2), np.repeat([*"ab"], 2000)
    assert krippendorff_alpha(units, raters, values.ravel()) == pytest.approx(0, abs=0.06)
    assert krippendorff_alpha(units, raters, np.tile(values[0], 2)) == 1.0
