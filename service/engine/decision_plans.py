"""Decision plans: which branches of a decision trie are scored to choose an action, so that few requests are enough.

A plan is a generator. It yields the branches that it needs next, receives their scores, and returns the chosen action.
All plans draw from the same distribution, that of `DecisionTrie.distribution`. With a seed they choose the same action.
"""

import math
import random
from bisect import bisect
from collections.abc import Generator, Iterator, Sequence
from heapq import heappop, heappush
from itertools import accumulate, chain, repeat

from service.engine import supports
from service.engine.decision_trie import Branch, Chosen, DecisionTrie, is_unscored, renormalised
from service.trajectory import Sampling

Plan = Generator[Sequence[Branch], Sequence[Sequence[float]], Chosen]
"""Yields branches. Receives the logprobs of the children of each one. Branches of one round are independent."""

_NUM_SINGLE_ROUNDS = 4


def plan(trie: DecisionTrie, sampling: Sampling, generator: random.Random, *, all_probs: bool) -> Plan:
    """Returns the plan with the fewest requests.

    all_probs: whether the probability of every action is wanted, which needs every branch.
    """
    if all_probs or len(trie.branches) <= 1:
        return _score_all(trie, sampling, generator)
    if trie.is_filtered(sampling) or not sampling.temperature:
        return _rank(trie, sampling, generator)
    return _descend(trie, sampling, generator)


def _score_all(trie: DecisionTrie, sampling: Sampling, generator: random.Random) -> Plan:
    """Scores all branches in one round."""
    scores = (yield trie.branches) if trie.branches else ()
    return trie.draw(scores, sampling, generator)


def _descend(trie: DecisionTrie, sampling: Sampling, generator: random.Random) -> Plan:
    """Draws child by child from the root to an action: one request for each branch on the way.

    One random number selects the child at each branch: the part of it that is left over selects the next child. This is
    the action that the number selects among all actions in their order, because a subtree's actions are contiguous.
    """
    point = generator.random()
    low, high, total = 0, len(trie.actions), 0.0
    decided: list[float] = []
    drawn_among: list[supports.Ids] = []
    known: dict[int, float] = {}
    while high - low > 1:
        branch = trie.branch(low, high)
        (scores,) = yield [branch]
        logprobs = renormalised(scores, sampling.temperature)
        for child, logprob in enumerate(logprobs):
            if branch.bounds[child + 1] - branch.bounds[child] == 1:
                known[branch.bounds[child]] = math.exp(total + logprob)
        child, point = _select([math.exp(logprob) for logprob in logprobs], point)
        decided.append(logprobs[child])
        drawn_among.append(None if is_unscored(scores) else branch.children)
        total += logprobs[child]
        low, high = branch.bounds[child], branch.bounds[child + 1]
    return trie.chosen(low, decided, total, known, drawn_among)


def _select(weights: Sequence[float], point: float) -> tuple[int, float]:
    """Returns the child whose interval contains the point of [0, 1), and where in this interval the point is."""
    ends = list(accumulate(weights))
    place = point * ends[-1]
    last = max(child for child, weight in enumerate(weights) if weight > 0)
    child = min(bisect(ends, place), last)
    start = ends[child - 1] if child else 0.0
    return child, min(max((place - start) / weights[child], 0.0), math.nextafter(1.0, 0.0))


def _rank(trie: DecisionTrie, sampling: Sampling, generator: random.Random) -> Plan:
    """Finds the likeliest actions in order (best-first search), until top_k, top_p and min_p leave no others. Then
    draws one of them. Without such filters, it takes the likeliest one.

    The probability of a branch bounds that of each action behind it. Rounds start with one branch. If that does not
    suffice, they take more and more of the branches that are likelier than any action known so far.
    """
    is_filtered = trie.is_filtered(sampling)
    num_kept = min(sampling.top_k or len(trie.actions), len(trie.actions)) if is_filtered else 1
    frontier = [(0.0, 0, len(trie.actions))]  # the negative logprob of reaching a subtree, and its rows
    shares: dict[tuple[int, int], float] = {}  # the logprob of each subtree among its siblings, by its rows
    ranked: dict[int, float] = {}
    unscored: list[Branch] = []
    mass = floor = 0.0
    widths = _widths()
    while frontier and len(ranked) < num_kept:
        prob = math.exp(-frontier[0][0])
        if ranked and (prob < floor or mass >= sampling.top_p):
            break
        if not _is_branch(frontier[0]):
            _, row, _ = heappop(frontier)
            ranked[row] = prob
            floor, mass = floor or sampling.min_p * prob, mass + prob
            continue
        expanded = list(_popped_branches(frontier, next(widths)))
        branches = [trie.branch(low, high) for _, low, high in expanded]
        for (cost, _, _), branch, scores in zip(expanded, branches, (yield branches), strict=True):
            if is_unscored(scores):
                unscored.append(branch)
            for child, logprob in enumerate(renormalised(scores, sampling.temperature)):
                low, high = branch.bounds[child], branch.bounds[child + 1]
                shares[low, high] = logprob
                heappush(frontier, (cost - logprob, low, high))
    known = {low: 0.0 if is_filtered else math.exp(-cost) for cost, low, high in frontier if high - low == 1}
    known.update((row, prob / mass if is_filtered else prob) for row, prob in ranked.items())
    probs = dict(sorted(known.items()))
    if is_filtered:
        return trie.drawn(probs, sampling, generator, unscored)
    (row,) = ranked
    way = list(trie.way(row))
    decided = [shares[branch.bounds[child], branch.bounds[child + 1]] for branch, child in way]
    drawn_among = [None if branch in unscored else branch.children for branch, _ in way]
    return trie.chosen(row, decided, sum(decided), probs, drawn_among)


def _is_branch(entry: tuple[float, int, int]) -> bool:
    return entry[2] - entry[1] > 1


def _popped_branches(frontier: list[tuple[float, int, int]], limit: int) -> Iterator[tuple[float, int, int]]:
    """Removes at most `limit` branches that are likelier than any known action."""
    while limit and frontier and _is_branch(frontier[0]):
        yield heappop(frontier)
        limit -= 1


def _widths() -> Iterator[int]:
    """Returns the number of branches in each round."""
    return chain(repeat(1, _NUM_SINGLE_ROUNDS), (2**number for number in range(1, 64)))
