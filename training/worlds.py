"""The toy-text environments ("worlds") as tables: texts of states, transitions, and the expert's policy.

Training plays on these tables, because many episodes can then be played at once with NumPy.
tests/environments/test_worlds.py checks them against the real Gymnasium environments.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from service.environments.frozen_lake import FrozenLakeText, is_held_out
from service.environments.toy_text import BlackjackText, CliffWalkingText, TaxiText

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

SIDE = 4
"""The side of the FrozenLake maps in training. There are only 2**14 maps of this size, so all can be enumerated."""


@dataclass(frozen=True, slots=True)
class World:
    """One environment family with W instances (maps), S states and A actions.

    - `states`: the text of each state
    - `first`: for each instance, the text that precedes the state's text in the first observation
    - `outcomes` (W, S, A, K): the K next states of an action, which are equally likely
    - `ends` (W, S, A, K): whether the episode ends with that next state
    - `expert` (W, S, A): the uniform distribution over the optimal actions
    - `starts` (W, S): the distribution of the start states in training
    - `weights` (W,): the probability with which an instance is drawn
    """

    name: str
    instructions: str
    actions: tuple[str, ...]
    states: tuple[str, ...]
    first: tuple[str, ...]
    outcomes: Ints
    ends: Bools
    expert: Floats
    starts: Floats
    weights: Floats


def _optimal(q: npt.NDArray[np.float64]) -> Floats:
    """The uniform distribution over the actions with the highest value. The last axis of `q` is the action."""
    best = q >= q.max(axis=-1, keepdims=True) - 1e-9
    return (best / best.sum(axis=-1, keepdims=True)).astype(np.float32)


def _value_iteration(outcomes: Ints, rewards: npt.NDArray[np.float64], ends: Bools, discount: float) -> Floats:
    """The expert of a deterministic world, by value iteration. All arrays have the shape (W, S, A)."""
    num_worlds, num_states, _num_actions = outcomes.shape
    values = np.zeros((num_worlds, num_states))
    rows = np.arange(num_worlds)[:, None, None]
    while True:
        q = rewards + discount * np.where(ends, 0.0, values[rows, outcomes])
        change = np.abs(q.max(axis=-1) - values).max()
        values = q.max(axis=-1)
        if change < 1e-10:
            return _optimal(q)


def lake_maps() -> list[list[str]]:
    """All 4x4 maps, solvable or not. Tile i + 1 is a hole if bit i of the map's index is set."""
    tiles = [["S", *("H" if index >> bit & 1 else "F" for bit in range(14)), "G"] for index in range(2**14)]
    return [["".join(flat[row * SIDE : (row + 1) * SIDE]) for row in range(SIDE)] for flat in tiles]


def _lake_moves() -> Ints:
    """The next tile for each tile and action, shape (16, 4)."""
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    last = SIDE - 1
    moves = [
        row * SIDE + np.maximum(column - 1, 0),
        np.minimum(row + 1, last) * SIDE + column,
        row * SIDE + np.minimum(column + 1, last),
        np.maximum(row - 1, 0) * SIDE + column,
    ]
    return np.stack(moves, axis=-1)


@cache
def frozen_lake(held_out: bool = False, frozen: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)) -> World:
    """All solvable 4x4 maps of one part of the train/held-out split.

    A map's weight is its mean probability over the values of `frozen`, the probability that a tile is frozen.
    """
    maps = lake_maps()
    holes = np.array([[cell == "H" for row in rows for cell in row] for rows in maps])
    moves = np.broadcast_to(_lake_moves(), (len(maps), 16, 4))
    arrives = holes[np.arange(len(maps))[:, None, None], moves]
    goal = moves == 15
    expert = _value_iteration(moves, goal.astype(np.float64), arrives | goal, 0.9)
    solvable = _reaches(holes, moves)
    kept = solvable & (np.array([is_held_out(rows) for rows in maps]) == held_out)
    num_holes = holes.sum(axis=1)
    weights = np.mean([(1 - p) ** num_holes * p ** (14 - num_holes) for p in frozen], axis=0)[kept]
    starts = np.zeros((int(kept.sum()), 16), dtype=np.float32)
    starts[:, 0] = 1
    return World(
        name="frozen_lake",
        instructions=FrozenLakeText.instructions,
        actions=FrozenLakeText.ACTIONS,
        states=tuple(FrozenLakeText.position(state, SIDE) for state in range(16)),
        first=tuple(FrozenLakeText.map(rows) + "\n" for rows, keep in zip(maps, kept, strict=True) if keep),
        outcomes=moves[kept][..., None],
        ends=(arrives | goal)[kept][..., None],
        expert=expert[kept],
        starts=starts,
        weights=(weights / weights.sum()).astype(np.float32),
    )


def _reaches(holes: Bools, moves: Ints) -> Bools:
    """Which maps have a path from the first tile to the last. `holes` has the shape (W, 16), `moves` (W, 16, 4)."""
    reached = np.zeros_like(holes)
    reached[:, 0] = True
    rows = np.arange(len(holes))[:, None, None]
    for _ in range(16):
        # Moves are symmetric, so a tile can be reached if one of its neighbours can.
        reached |= reached[rows, moves].any(axis=-1) & ~holes
    return reached[:, 15]


@cache
def cliff_walking() -> World:
    """CliffWalking from its start state. The expert comes from value iteration on the environment's own table."""
    outcomes, rewards, ends = _own_table("CliffWalking-v1")
    starts = np.zeros((1, outcomes.shape[1]), dtype=np.float32)
    starts[0, 36] = 1
    return World(
        name="cliff_walking",
        instructions=CliffWalkingText.instructions,
        actions=CliffWalkingText.ACTIONS,
        states=tuple(CliffWalkingText.position(state) for state in range(outcomes.shape[1])),
        first=("",),
        outcomes=outcomes[..., None],
        ends=ends[..., None],
        expert=_value_iteration(outcomes, rewards, ends, 0.99),
        starts=starts,
        weights=np.ones(1, dtype=np.float32),
    )


@cache
def taxi() -> World:
    """Taxi from any non-terminal state. The expert comes from value iteration on the environment's own table."""
    outcomes, rewards, ends = _own_table("Taxi-v4")
    passenger, destination = np.divmod(np.arange(outcomes.shape[1]) % 20, 4)
    starts = (passenger != destination).astype(np.float32)[None]
    return World(
        name="taxi",
        instructions=TaxiText.instructions,
        actions=TaxiText.ACTIONS,
        states=tuple(TaxiText.situation(state) for state in range(outcomes.shape[1])),
        first=("",),
        outcomes=outcomes[..., None],
        ends=ends[..., None],
        expert=_value_iteration(outcomes, rewards, ends, 0.99),
        starts=starts / starts.sum(),
        weights=np.ones(1, dtype=np.float32),
    )


def _own_table(env_id: str) -> tuple[Ints, npt.NDArray[np.float64], Bools]:
    """Next states, rewards and ends of a deterministic environment, each of shape (1, S, A), from its table `P`."""
    table: dict[int, dict[int, Any]] = gymnasium.make(env_id).unwrapped.P  # pyright: ignore
    rows = [[table[state][action] for action in sorted(table[state])] for state in sorted(table)]
    if any(len(cell) != 1 for row in rows for cell in row):
        raise ValueError(f"{env_id} is not deterministic: an action has several possible outcomes")
    cells = [[cell[0] for cell in row] for row in rows]
    pick = lambda part, kind: np.array([[cell[part] for cell in row] for row in cells], dtype=kind)[None]  # noqa: E731
    return pick(1, np.int64), pick(2, np.float64), pick(3, np.bool_)


CARDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10)
"""The cards of Gymnasium's infinite deck, which are equally likely. An ace is 1, face cards are 10."""

Hand = tuple[int, int, bool]
"""The player's sum, the dealer's open card, and whether the player has a usable ace."""


def blackjack_hands() -> list[Hand]:
    """All hands in which the player is not bust."""
    return [
        (player, dealer, ace)
        for ace in (False, True)
        for dealer in range(1, 11)
        for player in range(12 if ace else 4, 22)
    ]


def hit(hand: Hand, card: int) -> Hand | None:
    """The hand after the player draws a card. None if the player is bust."""
    player, dealer, ace = hand
    player += card
    if card == 1 and not ace and player + 10 <= 21:
        return player + 10, dealer, True
    if player > 21 and ace:
        player, ace = player - 10, False
    return None if player > 21 else (player, dealer, ace)


@cache
def _dealer_sums(total: int, ace: bool) -> dict[int, float]:
    """The distribution of the dealer's final score (0 if bust). The dealer sticks at 17 or more."""
    if total >= 17:
        return {total: 1.0}
    scores: dict[int, float] = {}
    for card in CARDS:
        after = hit((total, 1, ace), card)
        final = {0: 1.0} if after is None else _dealer_sums(after[0], after[2])
        for score, chance in final.items():
            scores[score] = scores.get(score, 0.0) + chance / len(CARDS)
    return scores


@cache
def stick_value(hand: Hand) -> float:
    """The expected reward of sticking, without the special rules for a natural (21 with the first two cards)."""
    player, dealer, _ace = hand
    value = 0.0
    for score, chance in _dealer_sums(11 if dealer == 1 else dealer, dealer == 1).items():
        value += chance * (float(player > score) - float(player < score))
    return value


@cache
def hit_value(hand: Hand) -> float:
    """The expected reward of hitting and then playing optimally."""
    value = 0.0
    for card in CARDS:
        after = hit(hand, card)
        value += -1.0 if after is None else max(stick_value(after), hit_value(after))
    return value / len(CARDS)


@cache
def blackjack() -> World:
    """Blackjack from any hand. The expert comes from dynamic programming over the infinite deck."""
    hands = blackjack_hands()
    number = {hand: index for index, hand in enumerate(hands)}
    q = np.array([[[stick_value(hand), hit_value(hand)] for hand in hands]])
    after = [[hit(hand, card) for card in CARDS] for hand in hands]
    outcomes = np.zeros((1, len(hands), 2, len(CARDS)), dtype=np.int64)
    ends = np.ones(outcomes.shape, dtype=np.bool_)
    outcomes[0, :, 1] = [[0 if hand is None else number[hand] for hand in row] for row in after]
    ends[0, :, 1] = [[hand is None for hand in row] for row in after]
    return World(
        name="blackjack",
        instructions=BlackjackText.instructions,
        actions=BlackjackText.ACTIONS,
        states=tuple(BlackjackText.hand(*hand) for hand in hands),
        first=("",),
        outcomes=outcomes,
        ends=ends,
        expert=_optimal(q),
        starts=np.full((1, len(hands)), 1 / len(hands), dtype=np.float32),
        weights=np.ones(1, dtype=np.float32),
    )
