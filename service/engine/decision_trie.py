"""Decision tries: discrete actions as token sequences, their distribution, and the draw of one. Pure."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from service.engine.base import ActionSpaceRefused
from service.trajectory import Sampling


@dataclass(frozen=True, slots=True)
class Branch:
    """A place in the trie where the model decides: the tokens so far, and the next ones there are.

    bounds: child i leads to the sorted sequences bounds[i]:bounds[i + 1].
    """

    path: tuple[int, ...]
    children: tuple[int, ...]
    bounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A drawn action. token_ids end with the terminator. drawn: 1 where the model decided. logprobs: one a token."""

    action: str
    token_ids: tuple[int, ...]
    drawn: bytes
    logprobs: tuple[float, ...]
    logprob: float
    probs: dict[str, float]


class DecisionTrie:
    """Actions as token sequences, each closed by the terminator, so that one action may be a prefix of another.

    The model is asked only at `branches`; every other token is forced. A distribution over actions is the product of
    the choices at the branches on the way, each renormalised over the tokens that lead to an action.
    """

    def __init__(self, actions: Sequence[str], encode: Callable[[str], list[int]], terminator: int) -> None:
        rows = sorted(((*encode(action), terminator), action) for action in actions)
        self.actions: tuple[str, ...] = tuple(action for _, action in rows)
        self.sequences: tuple[tuple[int, ...], ...] = tuple(ids for ids, _ in rows)
        for (ids, action), (other, twin) in pairwise(rows):
            if other[: len(ids)] == ids:
                raise ActionSpaceRefused(f"the policy's tokenizer cannot tell {action!r} and {twin!r} apart")
        self.branches: tuple[Branch, ...] = tuple(self._branches())
        self.max_len: int = max(map(len, self.sequences))

    def _branches(self) -> list[Branch]:
        found: list[Branch] = []
        pending = [(0, 0, len(self.sequences))]
        while pending:
            depth, low, high = pending.pop()
            while self.sequences[low][depth] == self.sequences[high - 1][depth] and high - low > 1:
                depth += 1
            if high - low == 1:
                continue
            starts = [i for i in range(low, high) if i == low or self._at(i, depth) != self._at(i - 1, depth)]
            bounds = (*starts, high)
            found.append(Branch(self.sequences[low][:depth], tuple(self._at(i, depth) for i in starts), bounds))
            pending.extend((depth + 1, a, b) for a, b in pairwise(bounds) if b - a > 1)
        return found

    def _at(self, row: int, depth: int) -> int:
        return self.sequences[row][depth]

    def distribution(self, scores: Sequence[Sequence[float]], sampling: Sampling) -> list[float]:
        """Probabilities of `actions`, in their order, given the logprobs of each branch's children.

        At temperature 0 this is the distribution at temperature 1, of which the most likely action is taken.
        """
        temperature = sampling.temperature or 1.0
        totals = [0.0] * len(self.actions)
        for branch, logprobs in zip(self.branches, scores, strict=True):
            top = max(logprobs)
            scaled = logprobs if top == -math.inf else [(value - top) / temperature for value in logprobs]
            for child, logprob in enumerate(log_softmax(scaled)):
                for row in range(branch.bounds[child], branch.bounds[child + 1]):
                    totals[row] += logprob
        return _filtered([math.exp(total) for total in totals], sampling)

    def draw(self, scores: Sequence[Sequence[float]], sampling: Sampling, generator: random.Random) -> Chosen:
        """Draws an action; `scores` holds the logprobs of each branch's children, in the order of `branches`."""
        probs = self.distribution(scores, sampling)
        rows = range(len(probs))
        row = generator.choices(rows, probs)[0] if sampling.temperature else max(rows, key=probs.__getitem__)
        drawn = bytearray(len(self.sequences[row]))
        logprobs = [0.0] * len(drawn)
        for branch in self.branches:
            if not branch.bounds[0] <= row < branch.bounds[-1]:
                continue
            child = next(i for i, end in enumerate(branch.bounds[1:]) if row < end)
            mass = sum(probs[branch.bounds[0] : branch.bounds[-1]])
            taken = sum(probs[branch.bounds[child] : branch.bounds[child + 1]])
            drawn[len(branch.path)] = 1
            logprobs[len(branch.path)] = math.log(min(taken / mass, 1.0))
        return Chosen(
            action=self.actions[row],
            token_ids=self.sequences[row],
            drawn=bytes(drawn),
            logprobs=tuple(logprobs),
            logprob=math.log(min(probs[row], 1.0)),
            probs=dict(zip(self.actions, probs, strict=True)),
        )


def log_softmax(values: Sequence[float]) -> list[float]:
    """Normalised logprobs. A branch the model gives nothing (all -inf) is uniform: its actions stay legal."""
    top = max(values)
    if top == -math.inf:
        return [-math.log(len(values))] * len(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def _filtered(probs: list[float], sampling: Sampling) -> list[float]:
    order = sorted(range(len(probs)), key=probs.__getitem__, reverse=True)
    keep = len(order) if sampling.top_k <= 0 else min(sampling.top_k, len(order))
    floor = sampling.min_p * probs[order[0]]
    mass = 0.0
    kept: set[int] = set()
    for row in order[:keep]:
        if kept and (probs[row] < floor or mass >= sampling.top_p):
            break
        kept.add(row)
        mass += probs[row]
    return [prob / mass if row in kept else 0.0 for row, prob in enumerate(probs)]
