"""Computes the report of an evaluation from what was read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from service.evaluation.baseline import compare
from service.evaluation.caveats import Seen, warnings
from service.evaluation.columns import Columns, Ints, Ratings
from service.evaluation.report import Question, Report
from service.evaluation.summary import summarize
from service.store.base import StepSample


@dataclass(frozen=True, slots=True)
class Acts:
    """The known durations in seconds, and the temperatures, of some acts of a group."""

    seconds: list[float]
    temperatures: frozenset[float]

    @classmethod
    def of(cls, steps: Iterable[StepSample]) -> Self:
        known = list(steps)
        return cls(
            [step.seconds for step in known if step.seconds is not None],
            frozenset(step.temperature for step in known if step.temperature is not None),
        )


def compute(columns: Columns, acts: Mapping[str | None, Acts], question: Question) -> Report:
    """Returns the report, with the groups sorted by their values, and null last. `acts`: some acts of each group."""
    with np.errstate(all="ignore"):  # returns near the largest float overflow, and their statistics become null
        values = sorted(columns.groups, key=lambda value: (value is None, value or ""))
        groups = _seen(columns, acts, question, {value: columns.groups[value].places for value in values})
        compared = compare({seen.group.value: seen.episodes for seen in groups}, question)
    found = warnings(groups, compared, by_policy=question.by == "policy")
    return Report(question.by, question.level, [seen.group for seen in groups], compared.compared, found)


def _seen(
    columns: Columns, acts: Mapping[str | None, Acts], question: Question, places: Mapping[str | None, Ints]
) -> list[Seen]:
    everything, ratings = columns.episodes, columns.ratings
    baseline = question.baseline if question.baseline in places else None
    expected = frozenset[float]() if baseline is None else acts[baseline].temperatures
    found: list[Seen] = []
    for value, chosen in places.items():
        episodes, own = everything.at(chosen), acts[value]
        group = summarize(value, episodes, _ratings_of(chosen, ratings), own.seconds, question.level)
        is_shared = baseline not in (None, value) and bool(np.isin(chosen, places[baseline]).any())
        found.append(Seen(group, episodes, own.temperatures | expected, is_shared))
    return found


def _ratings_of(chosen: Ints, ratings: Ratings) -> Ratings:
    """Returns the ratings of the episodes at these places, which are sorted, with the places among these episodes."""
    place = np.searchsorted(chosen, ratings.place)
    kept = place < len(chosen)
    kept[kept] = chosen[place[kept]] == ratings.place[kept]
    return Ratings(place[kept], ratings.rater[kept], ratings.rating[kept])
