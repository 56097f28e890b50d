"""Training data: transcripts of many episodes of one world as token arrays, with the expert's action in each state.

The played actions explore, so that the data covers many states. The label of each action is nevertheless the expert's
distribution in that state (as in DAgger: Ross, Gordon and Bagnell, 2011, arXiv:1011.0686).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.tokenizer import ASSISTANT, BEGIN, END, PAD, SYSTEM, USER
from training.worlds import Bools, Floats, Ints, World

Behaviour = Literal["random", "explore", "expert"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Transcripts of B episodes of one world, with at most N steps each and A possible actions.

    `tokens` (B, T) are the token ids. Episodes that ended early are padded on the right. `action_at` (N,) is the
    position of each step's action token, the same in every row. `labels` (B, N, A) are the expert's distributions over
    actions. `alive` (B, N) is true for steps that took place.
    """

    tokens: Ints
    action_at: Ints
    labels: Floats
    alive: Bools


class Transcripts:
    """Plays episodes of one world and writes their transcripts as tokens."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast) -> None:
        self.world = world
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        self._special = {
            token: tokenizer.convert_tokens_to_ids(token) for token in (BEGIN, END, SYSTEM, USER, ASSISTANT, PAD)
        }
        self._instructions = np.array(encode(world.instructions))
        self._states = np.array([encode(text) for text in world.states])
        self._first = np.array([encode(text) for text in world.first], dtype=np.int64)
        self.actions = np.array([encode(text) for text in world.actions])[:, 0]

    def sample(
        self, rng: np.random.Generator, num_episodes: int, num_steps: int, behaviour: Behaviour, instructed: bool
    ) -> Batch:
        """Plays `num_episodes` episodes of up to `num_steps` steps. `instructed` adds the system message."""
        world = self.world
        which = rng.choice(len(world.weights), size=num_episodes, p=world.weights / world.weights.sum())
        walk = play(world, rng, which, num_steps, behaviour)
        head = self._head(which, instructed)
        steps = self._steps(walk)
        # The map is part of the first user turn, so the head ends with that turn's marker and the map. The marker of
        # the first step is therefore left out here.
        tokens = np.concatenate([head, steps.reshape(num_episodes, -1)[:, 1:]], axis=1)
        block = steps.shape[2]
        action_at = head.shape[1] - 1 + np.arange(num_steps) * block + block - 2
        return Batch(tokens, action_at, world.expert[which[:, None], walk.states], walk.alive)

    def _head(self, which: Ints, instructed: bool) -> Ints:
        """The tokens before the first state's text, for each episode."""
        special = self._special
        start = [special[BEGIN]]
        if instructed:
            start += [special[SYSTEM], *self._instructions, special[END]]
        start += [special[USER]]
        return np.concatenate([np.tile(start, (len(which), 1)), self._first[which]], axis=1).astype(np.int64)

    def _steps(self, walk: "Walk") -> Ints:
        """The user turn and the assistant turn of every step, shape (B, N, number of tokens in a step)."""
        special, shape = self._special, walk.states.shape
        mark = lambda token: np.full((*shape, 1), special[token])  # noqa: E731
        parts = [
            mark(USER),
            self._states[walk.states],
            mark(END),
            mark(ASSISTANT),
            self.actions[walk.actions][..., None],
            mark(END),
        ]
        return np.where(walk.alive[..., None], np.concatenate(parts, axis=-1), special[PAD])


@dataclass(frozen=True, slots=True)
class Walk:
    """Episodes that were played at once. The arrays have the shape (B, N): B episodes of at most N steps."""

    states: Ints
    actions: Ints
    alive: Bools


def play(world: World, rng: np.random.Generator, which: Ints, num_steps: int, behaviour: Behaviour) -> Walk:
    """Plays many episodes at once.

    Except for the expert, actions that always end the episode are avoided if there is another, so that episodes are
    long and little padding is needed.
    """
    num = len(which)
    rows = np.arange(num)
    starts = world.starts[which].cumsum(axis=1)
    state = (rng.random((num, 1)) * starts[:, -1:] > starts).sum(axis=1)
    alive = np.ones(num, dtype=np.bool_)
    visits = np.zeros((num, len(world.states)), dtype=np.int64)
    guided = rng.random((num, 1)) * (behaviour != "random")
    if behaviour == "expert":
        guided = np.ones((num, 1))
    states, actions, alives = [], [], []
    for _ in range(num_steps):
        visits[rows, state] += 1
        outcomes, ends = world.outcomes[which, state], world.ends[which, state]
        scores = _scores(rng, world.expert[which, state], visits[rows[:, None], outcomes[..., 0]], guided, behaviour)
        if behaviour != "expert":
            scores = scores - 1e6 * ends.all(axis=-1)
        action = scores.argmax(axis=1)
        states.append(state)
        actions.append(action)
        alives.append(alive)
        pick = rng.integers(outcomes.shape[-1], size=num)
        alive = alive & ~ends[rows, action, pick]
        state = np.where(alive, outcomes[rows, action, pick], state)
    return Walk(np.stack(states, 1), np.stack(actions, 1), np.stack(alives, 1))


def _scores(rng: np.random.Generator, expert: Floats, visits: Ints, guided: Floats, behaviour: Behaviour) -> Floats:
    """Scores of the actions; the action with the highest score is played.

    With probability `guided` it is one of the expert's. Otherwise it is random, or one that leads to a state with few
    visits.
    """
    noise = rng.random(expert.shape)
    follow = rng.random((len(expert), 1)) < guided
    explore = noise if behaviour == "random" else noise - visits * (rng.random((len(expert), 1)) < 0.7)
    return np.where(follow, noise + 100.0 * (expert > 0), explore).astype(np.float32)
