"""GRPO: the advantage of each drawn token."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from service.learning import NothingToLearn, TrainingRefused
from service.learning.options import Options
from service.learning.segments import Floats, Kind
from service.learning.trajectories import Episode
from service.learning.units import Example, Selection, Unit, groups, score_of, scored

Doubles = npt.NDArray[np.float64]


def choose_advantages(episodes: Sequence[Episode], options: Options, chosen: Selection) -> None:
    """The advantage of each drawn token is the return of its episode minus the mean return of the episode's group.

    With a discount, it is the discounted return from the token's step on, minus the mean of this over all steps of the
    group (REINFORCE with baseline: R. Sutton and A. Barto, "Reinforcement Learning", 2nd edition, 2018, section 13.4).
    """
    played = chosen.with_result(episodes)
    sampled = [episode for episode in played if not episode.is_greedy]
    chosen.excluded["greedy (temperature 0)"] += len(played) - len(sampled)
    chosen.excluded["no return"] += sum(episode.episode_return is None for episode in sampled)
    used: list[Episode] = []
    for members in groups(scored(sampled), options.group_by).values():
        chosen.num_groups += len(members) > 1
        for episode, advantages in zip(members, _relative(members, options.discount), strict=True):
            if units := list(_examples(episode, advantages)):
                chosen.units += units
                used.append(episode)
            else:
                chosen.excluded[_unused(advantages, members)] += 1
    chosen.excluded = +chosen.excluded  # without zeros
    chosen.describe(used)
    if not chosen.units:
        raise NothingToLearn(_no_advantage(chosen))
    _refuse_filtered(chosen, options)


def _relative(members: Sequence[Episode], discount: float | None) -> list[Floats]:
    """Returns the advantages of each episode: one for each of its own steps, or a single one without a discount.

    They are exactly 0 if all are equal, or if there is nothing to compare with.
    """
    values = [_returns(episode, discount) for episode in members]
    every = np.concatenate(values)
    if len(members) == 1 or not every.size or every.min() == every.max():
        return [np.zeros(value.shape, np.float32) for value in values]
    return [(value - every.mean()).astype(np.float32) for value in values]


def _returns(episode: Episode, discount: float | None) -> Doubles:
    """The return of the episode, or the discounted return from each of its own steps on."""
    if discount is None:
        return np.array([score_of(episode)])
    if episode.rewards is None or any((row.steps < 0).any() for row in episode.rows):
        raise TrainingRefused(
            "the export does not have the reward of each step, which a discount needs. Export it again with the "
            "current version, or train without --discount."
        )
    found = np.array(episode.rewards, np.float64)
    for step in range(len(found) - 2, -1, -1):
        found[step] += discount * found[step + 1]
    return found


def _examples(episode: Episode, advantages: Floats) -> Iterable[Unit]:
    first = episode.parent[1] if episode.parent else 0
    for row in episode.rows if advantages.any() else ():
        if (kept := row.kinds != Kind.RECORDED).any():
            drawn = row.take(kept)
            steps = np.zeros_like(drawn.steps) if len(advantages) == 1 else drawn.steps - first
            yield (Example(drawn, advantages[steps]),)


def _unused(advantages: Floats, members: Sequence[Episode]) -> str:
    if len(members) == 1:
        return "alone in its group"
    return "no tokens to train" if advantages.any() else "return equals the mean of its group"


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
