"""Chooses what is trained: which tokens of which episodes, with which weights, advantages or pairs."""

from collections.abc import Iterable, Sequence

import numpy as np

from service.learning.advantages import choose_advantages
from service.learning.imitation import choose_imitation
from service.learning.options import Options
from service.learning.pairs import choose_pairs
from service.learning.trajectories import Episode
from service.learning.units import Selection


def select(episodes: Sequence[Episode], options: Options) -> Selection:
    """Chooses the units of a method. Raises TrainingRefused if there is nothing to learn."""
    chosen = Selection(num_episodes=len(episodes))
    choose = {"bc": choose_imitation, "dpo": choose_pairs, "grpo": choose_advantages}[options.method]
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
