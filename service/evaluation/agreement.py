"""The agreement of human raters: Krippendorff's alpha."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[Any]
Metric = Literal["interval", "ordinal", "nominal"]


def krippendorff_alpha(units: Labels, raters: Labels, ratings: Floats, metric: Metric = "interval") -> float | None:
    """Krippendorff's alpha: 1 is perfect agreement, and 0 is the agreement that chance gives.

    Element i says that `raters[i]` gave `ratings[i]` to `units[i]`. Not every rater has to rate every unit. If a rater
    rated a unit several times, the last rating counts. There should be few distinct ratings, such as 1 to 5.

    None if no unit has ratings of two raters, or if all ratings in such units are equal: without variation, agreement
    cannot be distinguished from chance.

    K. Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    counts, values = _counts_by_unit(units, raters, ratings)
    counts = counts[counts.sum(axis=1) > 1]
    totals = counts.sum(axis=0)
    distances = _distances(values, totals, metric)
    expected = float(totals @ distances @ totals) / max(1.0, float(totals.sum()) - 1)
    if not expected:
        return None
    # A rating has the distance 0 from itself, so its pair with itself adds nothing.
    observed = np.sum((counts @ distances) * counts, axis=1) / (counts.sum(axis=1) - 1)
    return 1 - float(observed.sum()) / expected


def _counts_by_unit(units: Labels, raters: Labels, ratings: Floats) -> tuple[Floats, Floats]:
    """How many raters gave each distinct rating to each unit (units x distinct ratings), and the distinct ratings."""
    unit = np.unique(units, return_inverse=True)[1]
    rater = np.unique(raters, return_inverse=True)[1]
    pair = unit * (np.max(rater, initial=0) + 1) + rater
    # np.unique gives the first index of equal pairs. In reversed order this is the last rating.
    kept = len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1]
    values, value = np.unique(ratings[kept], return_inverse=True)
    counts = np.zeros((int(np.max(unit, initial=-1)) + 1, len(values)))
    np.add.at(counts, (unit[kept], value), 1)
    return counts, values


def _distances(values: Floats, totals: Floats, metric: Metric) -> Floats:
    """The squared difference of each pair of distinct ratings. `totals` says how often each occurs."""
    if metric == "nominal":
        return 1 - np.eye(len(values))
    # Ordinal ratings are as far apart as there are ratings between them, counting half of those equal to either.
    positions = values if metric == "interval" else np.cumsum(totals) - totals / 2
    return (positions[:, None] - positions[None, :]) ** 2
