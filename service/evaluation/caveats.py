"""Warns of what limits a report, for example few episodes or several environments in one mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from service.evaluation.baseline import Comparisons
from service.evaluation.columns import UNKNOWN, Episodes, Ints
from service.evaluation.report import Group, Warned

FEW = 30
"""Below this number of episodes with a result, intervals are wide and depend on assumptions."""
_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """A group of a report, and what is known about its episodes.

    temperatures: those of its sampled acts and of the baseline's.
    is_shared: whether an episode is in the baseline, too.
    """

    group: Group
    episodes: Episodes
    temperatures: frozenset[float]
    is_shared: bool


RULES: Sequence[tuple[str, str, Callable[[Seen, Comparisons], bool]]] = [
    (
        "few_episodes",
        f"Fewer than {FEW} episodes have a result, so the intervals are wide.",
        lambda seen, _: seen.group.returns.n < FEW,
    ),
    (
        "several_envs",
        "The episodes are of several environments, and a mean over them depends on how often each was played. Use the "
        "filter env.",
        lambda seen, _: _differ(seen.episodes.env[seen.episodes.has_result]),
    ),
    (
        "several_versions",
        "The policy had several versions under one name. Use by=policy_version.",
        lambda seen, _: _differ(seen.episodes.version),
    ),
    (
        "recorded_actions",
        "Somebody else than the policy chose some of the actions.",
        lambda seen, _: bool(np.any(seen.episodes.num_recorded > 0)),
    ),
    (
        "parse_failures_unknown",
        "An older version, which counted no parse failures, opened some of the episodes.",
        lambda seen, _: bool(np.any(seen.episodes.num_parse_failures == UNKNOWN)),
    ),
    (
        "one_rater",
        "All ratings are by one person or without a name, so the agreement of raters is unknown.",
        lambda seen, _: seen.group.human.n > 0 and seen.group.human.raters < 2,
    ),
    (
        "different_temperatures",
        "The acts have several temperatures, or another one than the baseline's.",
        lambda seen, _: len(seen.temperatures) > 1,
    ),
    (
        "averaged_plays",
        "Seeds were played several times, here or in the baseline. Their results were averaged before the pairing.",
        lambda seen, compared: seen.group.value in compared.averaged,
    ),
    (
        "unpaired",
        "No seed was played both here and in the baseline. An unpaired comparison finds fewer differences.",
        lambda seen, compared: seen.group.value in compared.unpaired,
    ),
    (
        "shared_episodes",
        "Some episodes are in the baseline, too, so the difference is underestimated.",
        lambda seen, _: seen.is_shared,
    ),
]
"""The code and the text of each warning, and whether it concerns a group."""


def warnings(groups: Sequence[Seen], compared: Comparisons, *, by_policy: bool) -> list[Warned]:
    """Returns the warnings of a report, each with the groups that it is about.

    by_policy: whether the episodes of a group should have one policy version.
    """
    if not groups:
        return [Warned("no_episodes", "No episodes match the filters.")]
    found: list[Warned] = []
    for code, detail, concerns in RULES:
        values = [seen.group.value for seen in groups if concerns(seen, compared)]
        if values and (by_policy or code != "several_versions"):
            found.append(Warned(code, f"{detail} Groups: {_names(values)}."))
    return found


def _differ(values: Ints) -> bool:
    return bool(len(values)) and bool(np.any(values != values[0]))


def _names(values: Sequence[str | None]) -> str:
    named = ", ".join("none" if value is None else repr(value) for value in values[:_MAX_NAMED])
    more = len(values) - _MAX_NAMED
    return f"{named} and {more} more" if more > 0 else named
