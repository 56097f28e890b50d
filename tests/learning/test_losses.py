"""The losses and their gradients, against hand-checked cases and straightforward reference code."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from service.learning.losses import LOSSES, Tokens
from service.learning.options import Method, Options


def tokens(logprobs: Any, behaviour: Any, weights: Any, *, reference: Any = None, unit: Any = None) -> Tokens:
    values = torch.tensor(logprobs, requires_grad=True)
    units = torch.tensor(unit if unit is not None else list(range(len(logprobs))))
    return Tokens(
        logprobs=values,
        behaviour=torch.tensor(behaviour),
        reference=None if reference is None else torch.tensor(reference),
        weights=torch.tensor(weights),
        drawn=torch.ones(len(logprobs), dtype=torch.bool),
        unit=units,
        num_units=int(units.max()) + 1,
    )


def loss_and_gradient(given: Tokens, method: Method, **options: Any) -> tuple[float, list[float], dict[str, float]]:
    loss, metrics = LOSSES[method](given, Options(method, **options))
    loss.backward()
    assert given.logprobs.grad is not None
    return loss.item(), given.logprobs.grad.tolist(), {name: float(value) for name, value in metrics.items()}


def test_behaviour_cloning_is_the_weighted_likelihood():
    loss, gradient, _ = loss_and_gradient(tokens([-1.0, -2.0], [-1.0, -1.0], [1.0, 0.25]), "bc")
    assert loss == pytest.approx(1.5)
    assert gradient == pytest.approx([-1.0, -0.25])


def test_dpo_of_one_pair():
    """Margin: (-1 - -1.5) - (-3 - -2) = 1.5. The gradient is -beta * sigmoid(-beta * margin) times the weight."""
    given = tokens([-1.0, -3.0], [0.0, 0.0], [1.0, -1.0], reference=[-1.5, -2.0], unit=[0, 0])
    loss, gradient, metrics = loss_and_gradient(given, "dpo", beta=0.5)
    slope = 0.5 / (1 + math.exp(0.75))
    assert loss == pytest.approx(math.log(1 + math.exp(-0.75)))
    assert gradient == pytest.approx([-slope, slope])
    assert (metrics["pair_margin"], metrics["pair_accuracy"]) == (pytest.approx(1.5), 1.0)


def test_dpo_sums_over_the_tokens_of_each_pair():
    random = np.random.default_rng(3)
    new, reference = random.normal(-1, 1, 7).astype("f4"), random.normal(-1, 1, 7).astype("f4")
    sides, unit = [1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0], [0, 0, 0, 1, 1, 1, 1]
    given = tokens(new.tolist(), [0.0] * 7, sides, reference=reference.tolist(), unit=unit)
    loss, _, _ = loss_and_gradient(given, "dpo", beta=0.3)
    expected = 0.0
    for pair in (0, 1):
        better = sum(new[i] - reference[i] for i in range(7) if unit[i] == pair and sides[i] > 0)
        worse = sum(new[i] - reference[i] for i in range(7) if unit[i] == pair and sides[i] < 0)
        expected += math.log(1 + math.exp(-0.3 * (better - worse)))
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 2.0, -2.0),  # unclipped: the gradient is -ratio * advantage
        (1.1, 2.0, -2.2),
        (1.5, 2.0, 0.0),  # already much more likely
        (0.5, 2.0, -1.0),
        (0.5, -2.0, 0.0),  # already much less likely
        (1.5, -2.0, 3.0),
        (2.9, -2.0, 5.8),
        (3.1, -2.0, 6.0),  # truncated: the importance weight is 3
        (1e30, -2.0, 6.0),
        (1e30, 2.0, 0.0),
    ],
)
def test_grpo_clips_and_truncates(ratio: float, advantage: float, gradient: float):
    given = tokens([-1.0], [-1.0 - math.log(ratio)], [advantage])
    _, found, metrics = loss_and_gradient(given, "grpo", clip=0.2, max_ratio=3.0)
    assert found == pytest.approx([gradient], abs=1e-5)
    assert metrics["clipped"] == (ratio >= 1.5 and advantage > 0) + (ratio == 0.5 and advantage < 0)
    assert metrics["ratio"] == pytest.approx(ratio, rel=1e-5)


def test_a_ratio_that_overflows_is_truncated_and_what_is_truncated_is_still_clipped():
    loss, gradient, _ = loss_and_gradient(tokens([0.0], [-200.0], [-1.0]), "grpo", max_ratio=3.0)
    assert (loss, gradient) == (3.0, [3.0])
    loss, gradient, metrics = loss_and_gradient(tokens([0.0], [-1.0], [1.0]), "grpo", clip=0.5, max_ratio=1.1)
    assert (loss, gradient, metrics["clipped"]) == (pytest.approx(-1.5), [0.0], 1.0)


def test_grpo_against_reference_code():
    random = np.random.default_rng(4)
    new, old, reference = (random.normal(-1, 0.5, 40) for _ in range(3))
    advantages = random.normal(0, 1, 40)
    expected = 0.0
    for n, o, r, a in zip(new, old, reference, advantages, strict=True):
        ratio = min(math.exp(n - o), 2.0)
        surrogate = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        penalty = math.exp(r - n) - (r - n) - 1
        expected += 0.1 * penalty - surrogate
    given = tokens(
        *(x.astype("f4").tolist() for x in (new, old, advantages)), reference=reference.astype("f4").tolist()
    )
    loss, _, metrics = loss_and_gradient(given, "grpo", clip=0.2, max_ratio=2.0, kl=0.1)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert metrics["ratio_max"] == pytest.approx(max(math.exp(n - o) for n, o in zip(new, old, strict=True)), rel=1e-4)


def test_the_kl_estimator_is_zero_for_equal_policies_and_unbiased():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    given = tokens(np.log(p).tolist(), np.log(p).tolist(), [0.0] * 3, reference=np.log(q).tolist())
    assert loss_and_gradient(given, "grpo", kl=1.0)[0] == pytest.approx(sum(q / p - 1 - np.log(q / p)), rel=1e-5)
    expectation = sum(p * (q / p - 1 - np.log(q / p)))
    assert expectation == pytest.approx(sum(p * np.log(p / q)))
    same = tokens([-1.0], [-1.0], [0.0], reference=[-1.0])
    assert loss_and_gradient(same, "grpo", kl=1.0)[:2] == (0.0, [0.0])
