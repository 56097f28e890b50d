"""DPO: which episodes are paired, and which of their tokens count."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from service.learning import NothingToLearn
from service.learning.options import Options
from service.learning.segments import Flags, Kind, Row
from service.learning.trajectories import Episode
from service.learning.units import Example, Selection, Unit, groups

Parents = Mapping[str, tuple[str, int] | None]
"""For each episode, the one that it was forked from, and the index of its own first step."""


def choose_pairs(episodes: Sequence[Episode], options: Options, chosen: Selection) -> None:
    """In each group, pairs the best episode with the worst, the second best with the second worst, and so on."""
    played = chosen.with_result(episodes)
    parents = {episode.episode_id: episode.parent for episode in episodes}
    paired: set[str] = set()
    used: list[Episode] = []
    for members in groups(played, options.group_by).values():
        scores = {one.episode_id: _score(one, options) for one in members}
        known = sorted(
            (one for one in members if scores[one.episode_id] is not None), key=lambda one: _key(scores, one)
        )
        chosen.num_groups += len(known) > 1
        for better, worse in zip(reversed(known[(len(known) + 1) // 2 :]), known, strict=False):
            if scores[better.episode_id] != scores[worse.episode_id] and (unit := _pair(better, worse, parents)):
                chosen.units.append(unit)
                used += [better, worse]
                paired |= {better.episode_id, worse.episode_id}
    for episode in played:
        if episode.episode_id not in paired:
            chosen.excluded[_unpaired(episode, options)] += 1
    chosen.describe(used)
    if not chosen.units:
        raise NothingToLearn(_no_pairs(chosen, options))


def _key(scores: Mapping[str, float | None], episode: Episode) -> float:
    return scores[episode.episode_id] or 0.0


def _score(episode: Episode, options: Options) -> float | None:
    return episode.episode_return if options.score == "return" else episode.ratings.get(None)


def _unpaired(episode: Episode, options: Options) -> str:
    return f"no {options.score}" if _score(episode, options) is None else "no pair"


def _pair(better: Episode, worse: Episode, parents: Parents) -> Unit | None:
    """Returns the drawn tokens of both, without the steps that they share because one descends from the other."""
    shared = _num_shared(better, worse, parents)
    examples = [
        Example(row, np.full(len(row.positions), sign, np.float32))
        for episode, sign in ((better, 1.0), (worse, -1.0))
        for row in _rows_from(shared, episode)
    ]
    return tuple(examples) if len({float(example.weights[0]) for example in examples}) == 2 else None


def _num_shared(one: Episode, other: Episode, parents: Parents) -> int:
    """The number of first steps that two episodes have in common, as far as the data has their ancestors."""
    first, second = _lineage(one.episode_id, parents), _lineage(other.episode_id, parents)
    return int(max((min(first[name], second[name]) for name in first.keys() & second.keys()), default=0))


def _lineage(name: str, parents: Parents) -> dict[str, float]:
    """The episode and its ancestors, and how many first steps of each it has."""
    found: dict[str, float] = {name: math.inf}
    while (parent := parents.get(name)) and parent[0] not in found:
        found[parent[0]] = min(found[name], parent[1])
        name = parent[0]
    return found


def _rows_from(first: int, episode: Episode) -> Iterable[Row]:
    for row in episode.rows:
        kept: Flags = (row.kinds != Kind.RECORDED) & ((row.steps >= first) | (row.steps < 0))
        if kept.any():
            yield row.take(kept)


def _no_pairs(chosen: Selection, options: Options) -> str:
    if not chosen.num_groups:
        return (
            f"nothing to compare: no two episodes with a {options.score} belong to one group, fork family, or "
            "environment and seed. Play each seed several times: episodic rollout --repeat 8"
        )
    return f"nothing to learn: in each of the {chosen.num_groups} groups, every {options.score} is equal"
