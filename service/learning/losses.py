"""The losses of the three methods. Each is a sum over the tokens (or pairs) of a part of a batch.

The trainer divides the sum by the size of the whole batch: the sum of the weights (bc), the number of pairs (dpo), or
the number of trained tokens (grpo).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.learning.options import Method, Options

Metrics = Mapping[str, Tensor]
"""Sums over the trained tokens; over the drawn ones for `ratio` and `kl`; over pairs for names that begin with `pair_`.
`num_drawn` is their number. Names that end in `_max` are a maximum."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The trained tokens of a part of a batch. All tensors are (N,).

    logprobs: under the policy that is trained, with gradient.
    behaviour: as stored, under the policy that acted.
    reference: under the reference policy; None if the method has none.
    weights: see `units.Example`.
    drawn: whether the policy drew the token. `behaviour` says nothing about the others.
    unit: index of the token's unit, from 0 to num_units - 1.
    """

    logprobs: Tensor
    behaviour: Tensor
    reference: Tensor | None
    weights: Tensor
    drawn: Tensor
    unit: Tensor
    num_units: int


def behaviour_cloning(tokens: Tokens, options: Options) -> tuple[Tensor, Metrics]:
    """The weighted negative log-likelihood."""
    del options
    return -(tokens.weights * tokens.logprobs).sum(), _drift(tokens)


def dpo(tokens: Tokens, options: Options) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta * margin) for each pair. The margin is the log-probability ratio of policy and reference,
    summed over the trained tokens of the better episode, minus that of the worse one.

    R. Rafailov et al., "Direct Preference Optimization", 2023, equation 7.
    """
    assert tokens.reference is not None
    ratios = tokens.weights * (tokens.logprobs - tokens.reference)
    margins = torch.zeros(tokens.num_units, device=ratios.device).index_add(0, tokens.unit, ratios)
    right = (margins > 0).float() + 0.5 * (margins == 0).float()
    metrics = {"pair_margin": margins.detach().sum(), "pair_accuracy": right.sum()}
    return -F.logsigmoid(options.beta * margins).sum(), {**_drift(tokens), **metrics}


def grpo(tokens: Tokens, options: Options) -> tuple[Tensor, Metrics]:
    """PPO's clipped objective with the group-relative advantages in `weights`, and a KL penalty.

    The ratio is that of the policy and the policy that acted, whose log-probabilities are the stored ones. It is also
    the importance weight of a token's gradient, and as such truncated at `max_ratio` (L. Espeholt et al., "IMPALA",
    2018, section 4.1), because for negative advantages clipping does not limit it: the gradient of a token is
    min(ratio, max_ratio) * advantage * gradient of its log-probability, and 0 for a clipped token.

    There is no division by the standard deviation or by the length of an episode (Z. Liu et al., "Understanding
    R1-Zero-Like Training", 2025). The penalty is the unbiased estimator r - 1 - log r of the KL divergence from the
    reference (J. Schulman, "Approximating KL Divergence", 2020, k3).
    """
    log_ratio = tokens.logprobs - tokens.behaviour
    ratio = log_ratio.detach().exp()
    bound = ratio.clamp(1 - options.clip, 1 + options.clip)
    clipped = bound * tokens.weights < ratio * tokens.weights
    weight = ratio.clamp(max=options.max_ratio) * (log_ratio - log_ratio.detach()).exp()  # the last factor is 1
    gain = torch.where(clipped, bound, weight) * tokens.weights
    metrics = {**_drift(tokens), "advantage": tokens.weights.sum(), "clipped": clipped.float().sum()}
    if tokens.reference is None:
        return -gain.sum(), metrics
    to_reference = tokens.reference - tokens.logprobs
    penalty = to_reference.exp() - 1 - to_reference
    return (options.kl * penalty - gain).sum(), {**metrics, "reference_kl": penalty.detach().sum()}


Loss = Callable[[Tokens, Options], tuple[Tensor, Metrics]]

LOSSES: dict[Method, Loss] = {"bc": behaviour_cloning, "dpo": dpo, "grpo": grpo}


def _drift(tokens: Tokens) -> dict[str, Tensor]:
    """How far the policy is from the one that acted, over the tokens that were drawn: the ratio of the probabilities,
    and the KL divergence from the policy that acted (k3)."""
    log_ratio = (tokens.logprobs.detach() - tokens.behaviour)[tokens.drawn]
    ratio = log_ratio.exp()
    largest = ratio.max() if len(ratio) else torch.zeros(())
    kl = (ratio - 1 - log_ratio).sum()
    drawn = {"num_drawn": tokens.drawn.sum(), "ratio": ratio.sum(), "kl": kl, "ratio_max": largest}
    return {"logprob": tokens.logprobs.detach().sum(), **drawn}
