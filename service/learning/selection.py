"""Chooses what is trained: which tokens of which episodes, with which weights, advantages or pairs."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from service.learning import NothingToLearn, TrainingRefused
from service.learning.options import Options
from service.learning.segments import Flags, Floats, Kind, Row
from service.learning.trajectories import Episode

_TOP = re.compile(r"top:(0?\.\d+|1|1\.0*)")

Weigh = Callable[[Episode, Row], Floats]
"""Returns the weight of each trained token of a row; 0 for tokens that are not imitated."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row, and the weight of each of its trained tokens.

    weights: bc: the weight. grpo: the advantage. dpo: 1 in the better episode of a pair, -1 in the worse one.
    """

    row: Row
    weights: Floats


Unit = tuple[Example, ...]
"""Examples that belong together: a segment (bc, grpo), or all segments of a pair (dpo)."""


@dataclass(slots=True)
class Selection:
    """The units, and how they were chosen.

    excluded: number of episodes that are not trained, by reason.
    """

    units: list[Unit] = field(default_factory=list[Unit])
    num_episodes: int = 0
    num_used: int = 0
    num_groups: int = 0
    mean_return: float | None = None
    excluded: Counter[str] = field(default_factory=Counter[str])
    warnings: list[str] = field(default_factory=list[str])

    @property
    def rows(self) -> list[Row]:
        return [example.row for unit in self.units for example in unit]

    def kinds(self) -> dict[str, float]:
        """The share of each kind among the trained tokens."""
        counts = np.bincount(np.concatenate([row.kinds for row in self.rows]), minlength=len(Kind))
        return {kind.name.lower(): float(counts[kind] / counts.sum()) for kind in Kind if counts[kind]}

    def as_json(self) -> dict[str, Any]:
        rows = self.rows
        return {
            "episodes": self.num_episodes,
            "episodes_used": self.num_used,
            "episodes_excluded": dict(sorted(self.excluded.items())),
            "groups": self.num_groups,
            "units": len(self.units),
            "segments": len(rows),
            "steps": _num_steps(rows),
            "tokens": sum(len(row.token_ids) for row in rows),
            "trained_tokens": sum(len(row.positions) for row in rows),
            "token_kinds": self.kinds(),
            "mean_return": self.mean_return,
        }


def _num_steps(rows: Sequence[Row]) -> int | None:
    """The number of trained steps; None if an export does not say where steps begin."""
    if any((row.steps < 0).any() for row in rows):
        return None
    return sum(len(np.unique(row.steps)) for row in rows)


def select(episodes: Sequence[Episode], options: Options) -> Selection:
    """Chooses the units of a method. Raises TrainingRefused if there is nothing to learn."""
    chosen = Selection(num_episodes=len(episodes))
    choose = {"bc": _choose_imitation, "dpo": _choose_pairs, "grpo": _choose_advantages}[options.method]
    choose(episodes, options, chosen)
    assert chosen.units  # each of them raises TrainingRefused otherwise
    chosen.warnings += _warnings(chosen, options)
    return chosen


def _warnings(chosen: Selection, options: Options) -> Iterable[str]:
    targets = {int(token) for row in chosen.rows for token in np.unique(row.token_ids[row.positions])}
    if len(targets) == 1:
        yield f"every trained token is the same one (id {targets.pop()}): the policy only learns to repeat one action"
    if share := chosen.kinds().get("filtered"):
        yield (
            f"{share:.1%} of the trained tokens were drawn from a filtered distribution (top-k, top-p, min-p or a "
            "grammar) that the export does not have: their log-probability is that over the whole vocabulary"
        )


# Behaviour cloning


def parse_keep(rule: str) -> None:
    """Checks a rule of `keep`. Raises ValueError.

    success: drawn tokens of episodes that ended with success.
    top:FRACTION: drawn tokens of the best episodes of each group, by return.
    recorded: tokens of actions that somebody else chose.
    rated: drawn tokens of rated steps and episodes. Rating 5 has the weight 1, and rating 1 the weight 0.
    """
    if rule not in ("success", "recorded", "rated") and not _TOP.fullmatch(rule):
        raise ValueError(f"{rule!r} is none of success, recorded, rated, top:FRACTION (for example top:0.25)")


def _choose_imitation(episodes: Sequence[Episode], options: Options, chosen: Selection) -> None:
    weighers = [_weigher(rule, episodes) for rule in options.keep]
    used: list[Episode] = []
    for episode in episodes:
        units = list(_imitations(episode, weighers))
        chosen.units += units
        if units:
            used.append(episode)
        else:
            chosen.excluded["not kept" if episode.rows else "no tokens to train"] += 1
    _describe(chosen, used)
    if not chosen.units:
        raise NothingToLearn(_nothing_kept(episodes, options))


def _imitations(episode: Episode, weighers: Sequence[Weigh]) -> Iterable[Unit]:
    for row in episode.rows:
        weights = np.max([weigh(episode, row) for weigh in weighers], axis=0)
        if weights.any():
            yield (Example(row.take(weights > 0), weights[weights > 0]),)


def _weigher(rule: str, episodes: Sequence[Episode]) -> Weigh:
    if rule == "success":
        return lambda episode, row: _drawn(row) * np.float32(episode.success is True)
    if rule == "recorded":
        return lambda episode, row: (row.kinds == Kind.RECORDED).astype(np.float32)
    if rule == "rated":
        return _rated
    best = _best(episodes, float(rule.removeprefix("top:")))
    return lambda episode, row: _drawn(row) * np.float32(episode.episode_id in best)


def _drawn(row: Row) -> Floats:
    return (row.kinds != Kind.RECORDED).astype(np.float32)


def _rated(episode: Episode, row: Row) -> Floats:
    """The rating of the token's step, or else that of its episode, from 0 (rating 1, or no rating) to 1 (rating 5)."""
    of_episode = episode.ratings.get(None, 1.0)
    ratings = [episode.ratings.get(step, of_episode) for step in row.steps.tolist()]
    return _drawn(row) * ((np.asarray(ratings, np.float32) - 1) / 4).astype(np.float32)


def _best(episodes: Sequence[Episode], fraction: float) -> set[str]:
    """The best episodes of each group, at least one. Where all returns are equal, none is better."""
    best: set[str] = set()
    for members in groups(episodes).values():
        scored = sorted(((_scored(one), one.episode_id) for one in members), key=lambda pair: -pair[0])
        worst = scored[-1][0] if scored else 0.0
        best |= {name for score, name in scored[: math.ceil(fraction * len(scored))] if score > worst}
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


# Groups


def groups(episodes: Sequence[Episode]) -> dict[tuple[str, ...], list[Episode]]:
    """Returns the scored episodes that can be compared with each other.

    These are the episodes of a `group`; forks have one with the episode that they were forked from. Episodes without a
    group are compared with those of the same environment and seed.
    """
    parents = {episode.parent[0] for episode in episodes if episode.parent}
    found: dict[tuple[str, ...], list[Episode]] = {}
    for episode in episodes:
        if episode.episode_return is not None:
            found.setdefault(_group(episode, parents), []).append(episode)
    return found


def _group(episode: Episode, parents: set[str]) -> tuple[str, ...]:
    if episode.group is not None:
        return ("group", episode.group)
    if episode.episode_id in parents:
        return ("group", episode.episode_id)  # the group of its forks has its id
    return ("situation", *episode.situation) if episode.situation else ("episode", episode.episode_id)


def _scored(episode: Episode) -> float:
    assert episode.episode_return is not None  # `groups` leaves out the others
    return episode.episode_return


# DPO


def _choose_pairs(episodes: Sequence[Episode], options: Options, chosen: Selection) -> None:
    """In each group, pairs the best episode with the worst, the second best with the second worst, and so on."""
    paired: set[str] = set()
    used: list[Episode] = []
    for members in groups(episodes).values():
        scores = {one.episode_id: _score(one, options) for one in members}
        known = sorted(
            (one for one in members if scores[one.episode_id] is not None), key=lambda one: _key(scores, one)
        )
        chosen.num_groups += len(known) > 1
        for better, worse in zip(reversed(known[(len(known) + 1) // 2 :]), known, strict=False):
            if scores[better.episode_id] != scores[worse.episode_id] and (unit := _pair(better, worse)):
                chosen.units.append(unit)
                used += [better, worse]
                paired |= {better.episode_id, worse.episode_id}
    for episode in episodes:
        if episode.episode_id not in paired:
            chosen.excluded[_unpaired(episode, options)] += 1
    _describe(chosen, used)
    if not chosen.units:
        raise NothingToLearn(_no_pairs(chosen, options))


def _key(scores: Mapping[str, float | None], episode: Episode) -> float:
    return scores[episode.episode_id] or 0.0


def _score(episode: Episode, options: Options) -> float | None:
    return episode.episode_return if options.score == "return" else episode.ratings.get(None)


def _unpaired(episode: Episode, options: Options) -> str:
    return f"no {options.score}" if _score(episode, options) is None else "no pair"


def _pair(better: Episode, worse: Episode) -> Unit | None:
    """Returns the drawn tokens of both. If one was forked from the other, the steps that they share do not count."""
    sides = [(better, worse, 1.0), (worse, better, -1.0)]
    examples = [
        Example(row, np.full(len(row.positions), sign, np.float32))
        for episode, other, sign in sides
        for row in _rows_apart(episode, other)
    ]
    return tuple(examples) if len({float(example.weights[0]) for example in examples}) == 2 else None


def _rows_apart(episode: Episode, other: Episode) -> Iterable[Row]:
    first = other.parent[1] if other.parent and other.parent[0] == episode.episode_id else 0
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


# GRPO


def _choose_advantages(episodes: Sequence[Episode], options: Options, chosen: Selection) -> None:
    """The advantage of each drawn token is the return of its episode minus the mean return of the episode's group."""
    sampled = [episode for episode in episodes if not episode.is_greedy]
    chosen.excluded["greedy (temperature 0)"] += len(episodes) - len(sampled)
    chosen.excluded["no return"] += sum(episode.episode_return is None for episode in sampled)
    used: list[Episode] = []
    for members in groups(sampled).values():
        chosen.num_groups += len(members) > 1
        for episode, advantage in zip(members, _relative(members), strict=True):
            if units := list(_advantages(episode, advantage)):
                chosen.units += units
                used.append(episode)
            else:
                chosen.excluded[_unused(advantage, members)] += 1
    chosen.excluded = +chosen.excluded  # without zeros
    _describe(chosen, used)
    if not chosen.units:
        raise NothingToLearn(_no_advantage(chosen))
    _refuse_filtered(chosen, options)


def _relative(members: Sequence[Episode]) -> list[float]:
    """Returns each return minus the mean. If all are equal, the results are exactly 0."""
    returns = [_scored(episode) for episode in members]
    mean = returns[0] if min(returns) == max(returns) else fmean(returns)
    return [value - mean for value in returns]


def _advantages(episode: Episode, advantage: float) -> Iterable[Unit]:
    for row in episode.rows if advantage else ():
        if (kept := row.kinds != Kind.RECORDED).any():
            drawn = row.take(kept)
            yield (Example(drawn, np.full(len(drawn.positions), advantage, np.float32)),)


def _unused(advantage: float, members: Sequence[Episode]) -> str:
    if len(members) == 1:
        return "alone in its group"
    return "no tokens to train" if advantage else "return equals the mean of its group"


def _no_advantage(chosen: Selection) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in chosen.excluded.items())
    advice = (
        "Play each seed several times with a temperature above 0: episodic rollout --repeat 8 --temperature 1"
        if not chosen.num_groups
        else "Play more seeds, or harder or easier ones: where all plays of a seed score the same, none is better"
    )
    return f"nothing to learn: no episode's return differs from the mean of its group ({reasons}). {advice}"


def _refuse_filtered(chosen: Selection, options: Options) -> None:
    share = chosen.kinds().get("filtered", 0.0)
    if share and not options.allow_filtered:
        raise TrainingRefused(
            f"{share:.1%} of the trained tokens were drawn from a filtered distribution that the export does not have, "
            "so their importance weights would be wrong. Collect episodes without top_k, top_p, min_p and grammars, or "
            "export again if an older version wrote the file. --allow-filtered trains on them anyway."
        )


def _describe(chosen: Selection, used: Sequence[Episode]) -> None:
    chosen.num_used = len({episode.episode_id for episode in used})
    returns = [episode.episode_return for episode in used if episode.episode_return is not None]
    chosen.mean_return = fmean(returns) if returns else None
