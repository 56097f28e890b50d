"""Behaviour cloning: which tokens are imitated, with which weights."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from service.learning import NothingToLearn
from service.learning.options import GroupBy, Options
from service.learning.segments import Floats, Kind, Row
from service.learning.trajectories import Episode
from service.learning.units import Example, Selection, Unit, groups, score_of, scored

_TOP = re.compile(r"top:(0?\.\d+|1|1\.0*)")

Weigh = Callable[[Episode, Row], Floats]
"""Returns the weight of each trained token of a row; 0 for tokens that are not imitated."""


def parse_keep(rule: str) -> None:
    """Checks a rule of `keep`. Raises ValueError.

    success: drawn tokens of episodes that ended with success and were not given up.
    top:FRACTION: drawn tokens of the best episodes of each group, by return, without those that were given up.
    recorded: tokens of actions that somebody else chose.
    rated: drawn tokens of rated steps and episodes. Rating 5 has the weight 1, and rating 1 the weight 0.
    """
    if rule not in ("success", "recorded", "rated") and not _TOP.fullmatch(rule):
        raise ValueError(f"{rule!r} is none of success, recorded, rated, top:FRACTION (for example top:0.25)")


def choose_imitation(episodes: Sequence[Episode], options: Options, chosen: Selection) -> None:
    weighers = [_weigher(rule, episodes, options.group_by) for rule in options.keep]
    used: list[Episode] = []
    for episode in episodes:
        units = list(_imitations(episode, weighers))
        chosen.units += units
        if units:
            used.append(episode)
        else:
            chosen.excluded[_unused(episode)] += 1
    chosen.describe(used)
    if not chosen.units:
        raise NothingToLearn(_nothing_kept(episodes, options))


def _unused(episode: Episode) -> str:
    if not episode.rows:
        return "no tokens to train"
    return "not kept" if episode.has_result else str(episode.stop_reason)


def _imitations(episode: Episode, weighers: Sequence[Weigh]) -> Iterable[Unit]:
    for row in episode.rows:
        weights = np.max([weigh(episode, row) for weigh in weighers], axis=0)
        if (weights > 0).any():
            yield (Example(row.take(weights > 0), weights[weights > 0]),)


def _weigher(rule: str, episodes: Sequence[Episode], by: GroupBy) -> Weigh:
    if rule == "success":
        return lambda episode, row: _drawn(row) * np.float32(episode.success is True and episode.has_result)
    if rule == "recorded":
        return lambda episode, row: (row.kinds == Kind.RECORDED).astype(np.float32)
    if rule == "rated":
        return _rated
    best = _best(episodes, float(rule.removeprefix("top:")), by)
    return lambda episode, row: _drawn(row) * np.float32(episode.episode_id in best)


def _drawn(row: Row) -> Floats:
    return (row.kinds != Kind.RECORDED).astype(np.float32)


def _rated(episode: Episode, row: Row) -> Floats:
    """The rating of the token's step, or else that of its episode, from 0 (rating 1, or no rating) to 1 (rating 5)."""
    of_episode = episode.ratings.get(None, 1.0)
    ratings = [episode.ratings.get(step, of_episode) for step in row.steps.tolist()]
    return _drawn(row) * ((np.asarray(ratings, np.float32) - 1) / 4).astype(np.float32)


def _best(episodes: Sequence[Episode], fraction: float, by: GroupBy) -> set[str]:
    """The best episodes of each group, at least one. Where all returns are equal, none is better."""
    best: set[str] = set()
    for members in groups(scored([one for one in episodes if one.has_result]), by).values():
        ranked = sorted(((score_of(one), one.episode_id) for one in members), key=lambda pair: -pair[0])
        worst = ranked[-1][0]
        best |= {name for score, name in ranked[: math.ceil(fraction * len(ranked))] if score > worst}
    return best


def _nothing_kept(episodes: Sequence[Episode], options: Options) -> str:
    num_failed = sum(one.success is False for one in episodes)
    num_unknown = sum(one.success is None for one in episodes)
    reasons = {
        "success": f"none of the {len(episodes)} episodes is a success ({num_failed} failed, {num_unknown} do not say)",
        "recorded": "no action was recorded by somebody else, or the export has no `recorded_mask`",
        "rated": "no step or episode has a rating above 1, or the export has no `feedback`",
    }
    top = "in each group, all returns are equal. Play each seed several times: episodic rollout --repeat 8"
    return "nothing to imitate: " + "; ".join(reasons.get(rule, top) for rule in options.keep)
