"""Decision tries: discrete actions as a trie of token sequences, which gives their exact distribution.

All functions are pure: the caller asks the model for logprobs. `decision_plans` says which ones a decision needs.
"""

import math
import random
from array import array
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from service.engine import supports
from service.engine.base import ActionSpaceRefused
from service.trajectory import Sampling
from service.values import immutable


@immutable
class Branch:
    """A node of the trie with several children, where the model decides.

    path: the tokens from the root to this node.
    children: the possible next tokens.
    bounds: child i leads to the actions bounds[i]:bounds[i + 1], in the order of `DecisionTrie.actions`.
    """

    path: tuple[int, ...]
    children: tuple[int, ...]
    bounds: tuple[int, ...]


@immutable
class Chosen:
    """An action that was drawn.

    token_ids: the action's tokens and the terminator.
    drawn: one byte for each token, 1 if the model decided, 0 if the token was forced.
    logprobs: one for each token under the distribution that it was drawn from (at temperature 0: under that of
    temperature 1); 0 if it was forced.
    logprob: of the whole action.
    probs: the probability of every action that is known: of all actions, or of some.
    support: among which ids each token was drawn, as `service.engine.supports` encodes it.
    """

    action: str
    token_ids: tuple[int, ...]
    drawn: bytes
    logprobs: tuple[float, ...]
    logprob: float
    probs: dict[str, float]
    support: "array[int]"


class DecisionTrie:
    """A trie of the actions' token sequences.

    Each sequence ends with the terminator, so that an action may be a prefix of another one. The model decides only at
    `branches`; every other token is forced. At a branch, the probabilities are renormalised over the tokens that lead
    to an action. The probability of an action is the product of the probabilities at the branches on its path.
    """

    def __init__(self, actions: Sequence[str], encode: Callable[[str], list[int]], terminator: int) -> None:
        """Raises ActionSpaceRefused if `encode` does not distinguish two actions."""
        rows = sorted(((*encode(action), terminator), action) for action in actions)
        self.actions: tuple[str, ...] = tuple(action for _, action in rows)
        self.sequences: tuple[tuple[int, ...], ...] = tuple(ids for ids, _ in rows)
        for (ids, action), (next_ids, next_action) in pairwise(rows):
            if next_ids[: len(ids)] == ids:
                names = f"{action[:100]!r} and {next_action[:100]!r}"
                raise ActionSpaceRefused(f"the policy's tokenizer cannot distinguish the actions {names}; rename one")
        self.branches: tuple[Branch, ...] = tuple(self._branches())
        self._by_rows = {(branch.bounds[0], branch.bounds[-1]): branch for branch in self.branches}
        self.max_len: int = max(map(len, self.sequences))
        self.num_tokens: int = sum(map(len, self.sequences))

    def branch(self, low: int, high: int) -> Branch:
        """Returns the branch that leads to exactly the actions low:high, of which there are several."""
        return self._by_rows[low, high]

    def way(self, row: int) -> Iterator[tuple[Branch, int]]:
        """Returns the branches on the path to an action, from the root on, each with the child to take."""
        low, high = 0, len(self.actions)
        while high - low > 1:
            branch = self.branch(low, high)
            child = bisect(branch.bounds, row) - 1
            yield branch, child
            low, high = branch.bounds[child], branch.bounds[child + 1]

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
        """Returns the probabilities of `actions`, in that order, after top_k, top_p and min_p.

        scores: the logprobs of each branch's children, in the order of `branches`.
        sampling: a temperature of 0 gives the distribution at temperature 1; `draw` takes its most likely action.
        """
        totals = [0.0] * len(self.actions)
        for branch, logprobs in zip(self.branches, scores, strict=True):
            for child, logprob in enumerate(renormalised(logprobs, sampling.temperature)):
                for row in range(branch.bounds[child], branch.bounds[child + 1]):
                    totals[row] += logprob
        return _filtered([math.exp(total) for total in totals], sampling)

    def is_filtered(self, sampling: Sampling) -> bool:
        """Whether top_k, top_p or min_p can leave out actions."""
        return 0 < sampling.top_k < len(self.actions) or sampling.top_p < 1.0 or sampling.min_p > 0.0

    def draw(self, scores: Sequence[Sequence[float]], sampling: Sampling, generator: random.Random) -> Chosen:
        """Draws an action, or takes the most likely one at temperature 0. Arguments are those of `distribution`."""
        probs = dict(enumerate(self.distribution(scores, sampling)))
        unscored = [branch for branch, logprobs in zip(self.branches, scores, strict=True) if is_unscored(logprobs)]
        return self.drawn(probs, sampling, generator, unscored)

    def drawn(
        self,
        probs: Mapping[int, float],
        sampling: Sampling,
        generator: random.Random,
        unscored: Sequence[Branch] = (),
    ) -> Chosen:
        """Like `draw`, from the probabilities of all actions, by row, in order. A row that is missing has none.

        unscored: the branches for which `is_unscored` holds.
        """
        rows = list(probs)
        is_drawn = sampling.temperature > 0
        row = generator.choices(rows, list(probs.values()))[0] if is_drawn else max(rows, key=probs.__getitem__)
        logprob = math.log(min(probs[row], 1.0))
        if len(self.branches) == 1 and len(rows) == len(self.actions):
            support = self._support(self.branches[0], probs, sampling, unscored)
            return self.chosen(row, [logprob], logprob, probs, [support])
        logprobs: list[float] = []
        drawn_among: list[supports.Ids] = []
        for branch, child in self.way(row):
            low, high = branch.bounds[child], branch.bounds[child + 1]
            mass = sum(probs.get(other, 0.0) for other in range(branch.bounds[0], branch.bounds[-1]))
            taken = sum(probs.get(other, 0.0) for other in range(low, high))
            logprobs.append(math.log(min(taken / mass, 1.0)))
            drawn_among.append(self._support(branch, probs, sampling, unscored))
        return self.chosen(row, logprobs, logprob, probs, drawn_among)

    def _support(
        self, branch: Branch, probs: Mapping[int, float], sampling: Sampling, unscored: Sequence[Branch]
    ) -> supports.Ids:
        """Returns the children of a branch among which the token was drawn: their probabilities are the model's,
        renormalised. None if there is no such set.

        Filters leave out actions. If there is one branch, they leave out its children. If there are several, the mass
        of the actions that are left out changes the shares of the children, and no renormalisation gives these shares.
        """
        if branch in unscored:
            return None
        if not self.is_filtered(sampling) or (len(probs) == len(self.actions) and all(probs.values())):
            return branch.children
        if len(self.branches) > 1:
            return None
        return tuple(token for row, token in enumerate(branch.children) if probs.get(row))

    def chosen(
        self,
        row: int,
        decided: Sequence[float],
        logprob: float,
        probs: Mapping[int, float],
        drawn_among: Sequence[supports.Ids],
    ) -> Chosen:
        """Returns the action of this row.

        decided, drawn_among: the logprob and the support at each branch on the way to it.
        """
        drawn = bytearray(len(self.sequences[row]))
        logprobs = [0.0] * len(drawn)
        way = self.branches if len(self.branches) == 1 else [branch for branch, _ in self.way(row)]
        places = [len(branch.path) for branch in way]
        for place, value in zip(places, decided, strict=True):
            drawn[place] = 1
            logprobs[place] = value
        return Chosen(
            action=self.actions[row],
            token_ids=self.sequences[row],
            drawn=bytes(drawn),
            logprobs=tuple(logprobs),
            logprob=logprob,
            probs={self.actions[known]: prob for known, prob in probs.items()},
            support=supports.of_choice(len(drawn), zip(places, drawn_among, strict=True)),
        )


def is_unscored(logprobs: Sequence[float]) -> bool:
    """Whether the model rules out all children of a branch. They are then drawn uniformly."""
    return max(logprobs) == -math.inf


def renormalised(logprobs: Sequence[float], temperature: float) -> list[float]:
    """Returns the logprobs of a branch's children after the temperature. A temperature of 0 counts as 1."""
    top = max(logprobs)
    if top == -math.inf:
        return log_softmax(logprobs)
    return log_softmax([(value - top) / (temperature or 1.0) for value in logprobs])


def log_softmax(values: Sequence[float]) -> list[float]:
    """Normalises logprobs. If all are -inf, the result is uniform, because the actions remain legal."""
    top = max(values)
    if top == -math.inf:
        return [-math.log(len(values))] * len(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def _filtered(probs: list[float], sampling: Sampling) -> list[float]:
    if not sampling.has_filters:
        mass = sum(probs)
        return [prob / mass for prob in probs]
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
