"""Transcripts of play as token arrays: many episodes of one world walked at once, each state labelled by the expert.

The behaviour explores on purpose, so that many states of a map are seen, while every action position is labelled with
the expert's distribution in that state (the idea of DAgger: Ross, Gordon and Bagnell, 2011, arXiv:1011.0686).
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
    """Transcripts of one world: `tokens` (B, T), and for B episodes of N steps where each action is and what is best.

    `action_at` (N,) is the index in T of each step's action token, the same in every row; `labels` (B, N, A) is the
    expert's distribution; `alive` (B, N) says which steps took place. Rows that ended early are padded on the right.
    """

    tokens: Ints
    action_at: Ints
    labels: Floats
    alive: Bools


class Transcripts:
    """Writes transcripts of one world in the policy's tokens."""

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
        """Walks `num_episodes` for up to `num_steps` steps; `instructed` puts the system message in front."""
        world = self.world
        which = rng.choice(len(world.weights), size=num_episodes, p=world.weights / world.weights.sum())
        walk = _walk(world, rng, which, num_steps, behaviour)
        head = self._head(which, instructed)
        steps = self._steps(walk)
        # The map stands inside the first user turn: between its marker and the first state's text.
        tokens = np.concatenate([head, steps.reshape(num_episodes, -1)[:, 1:]], axis=1)
        block = steps.shape[2]
        action_at = head.shape[1] - 1 + np.arange(num_steps) * block + block - 2
        return Batch(tokens, action_at, world.expert[which[:, None], walk.states], walk.alive)

    def _head(self, which: Ints, instructed: bool) -> Ints:
        special = self._special
        start = [special[BEGIN]]
        if instructed:
            start += [special[SYSTEM], *self._instructions, special[END]]
        start += [special[USER]]
        return np.concatenate([np.tile(start, (len(which), 1)), self._first[which]], axis=1).astype(np.int64)

    def _steps(self, walk: "_Walk") -> Ints:
        """User turn and assistant turn of every step: (B, N, block)."""
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
class _Walk:
    states: Ints
    actions: Ints
    alive: Bools


def _walk(world: World, rng: np.random.Generator, which: Ints, num_steps: int, behaviour: Behaviour) -> _Walk:
    """Walks that avoid moves sure to end the episode, where another move is left, so that rows stay full."""
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
    return _Walk(np.stack(states, 1), np.stack(actions, 1), np.stack(alives, 1))


def _scores(rng: np.random.Generator, expert: Floats, visits: Ints, guided: Floats, behaviour: Behaviour) -> Floats:
    """The action with the highest score is taken: the expert's with chance `guided`, else random or less visited."""
    noise = rng.random(expert.shape)
    follow = rng.random((len(expert), 1)) < guided
    explore = noise if behaviour == "random" else noise - visits * (rng.random((len(expert), 1)) < 0.7)
    return np.where(follow, noise + 100.0 * (expert > 0), explore).astype(np.float32)
