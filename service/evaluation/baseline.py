"""Compares the groups of a report with a baseline, on the same seeds where possible."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from service.evaluation import statistics
from service.evaluation.columns import Episodes, Floats, Ints
from service.evaluation.report import Compared, Question
from service.evaluation.statistics import Comparison
from service.filters import Metric


@dataclass(frozen=True, slots=True)
class Comparisons:
    """The comparisons with the baseline, and what limits them.

    averaged: the groups for which several plays of a seed were averaged. unpaired: those that share no seed with the
    baseline.
    """

    compared: list[Compared] = field(default_factory=list[Compared])
    averaged: set[str | None] = field(default_factory=set[str | None])
    unpaired: set[str | None] = field(default_factory=set[str | None])


def compare(groups: Mapping[str | None, Episodes], question: Question) -> Comparisons:
    """Compares every other group with the baseline, metric by metric. P-values are adjusted over all comparisons."""
    found = Comparisons()
    if question.baseline is None or question.baseline not in groups:
        return found
    results: list[tuple[str | None, Metric, Comparison]] = []
    for metric in question.metrics:
        baseline = _side(groups[question.baseline], metric)
        for value, episodes in groups.items():
            if value != question.baseline:
                side = _side(episodes, metric)
                comparison = _compared(side, baseline, question.level, metric)
                results.append((value, metric, comparison))
                _note(found, value, side, baseline, comparison)
    adjusted = statistics.holm([comparison.p for _, _, comparison in results])
    for (value, metric, comparison), p_adjusted in zip(results, adjusted, strict=True):
        found.compared.append(_with_verdict(value, metric, comparison, p_adjusted, question))
    return found


@dataclass(frozen=True, slots=True)
class _Side:
    """The values of one group, and their means by seed.

    unit: what was played in each episode. seeds: the units that have a seed, sorted. means: the mean of each.
    is_repeated: whether a seed was played several times.
    """

    values: Floats
    unit: Ints
    seeds: Ints
    means: Floats
    is_repeated: bool


def _side(episodes: Episodes, metric: Metric) -> _Side:
    kept = episodes.at(episodes.is_scored if metric == "completion" else episodes.has_result)
    values = (kept.success if metric == "completion" else kept.episode_return).astype(np.float64)
    seeded = kept.is_seeded == 1
    seeds, place, num_plays = np.unique(kept.unit[seeded], return_inverse=True, return_counts=True)
    sums = np.bincount(place, weights=values[seeded], minlength=len(seeds))
    return _Side(values, kept.unit, seeds, sums / num_plays, bool(np.any(num_plays > 1)))


def _compared(side: _Side, baseline: _Side, level: float, metric: Metric) -> Comparison:
    _, ours, theirs = np.intersect1d(side.seeds, baseline.seeds, assume_unique=True, return_indices=True)
    if len(ours):
        return statistics.paired(side.means[ours], baseline.means[theirs], level, kind=metric)
    return statistics.unpaired(side.values, baseline.values, side.unit, baseline.unit, level, kind=metric)


def _note(found: Comparisons, value: str | None, side: _Side, baseline: _Side, comparison: Comparison) -> None:
    if comparison.pairs and (side.is_repeated or baseline.is_repeated):
        found.averaged.add(value)
    if comparison.units and not comparison.pairs:
        found.unpaired.add(value)


def _with_verdict(
    value: str | None, metric: Metric, comparison: Comparison, p_adjusted: float | None, question: Question
) -> Compared:
    return Compared(
        a=value,
        b=question.baseline,
        metric=metric,
        pairs=comparison.pairs,
        delta=comparison.delta,
        low=comparison.low,
        high=comparison.high,
        p=comparison.p,
        p_adjusted=p_adjusted,
        method=comparison.method,
        verdict=statistics.verdict(comparison, p_adjusted, question.level),
    )
