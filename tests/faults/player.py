"""The load: players that make every kind of call, and retry each call until it is answered.

A player sends a failed call again without changes until it receives an answer. So the history contains exactly what the
service must have stored.
"""

import random
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Literal

from service.client import Act, AsyncClient, AsyncEpisode, ConnectionFailed, EpisodicError, Unavailable, calls
from service.client.models import EpisodeResource
from tests.faults.auditor import read
from tests.faults.history import History, Sent
from tests.faults.ledger import Ledger

NUM_MOVES = 6
BATCH_SIZE = 8

Move = Literal["act", "keyed", "recorded", "abandoned", "fork", "read"]
_MOVES: dict[Move, int] = {"act": 10, "keyed": 5, "recorded": 2, "abandoned": 3, "fork": 1, "read": 3}
"""Relative frequency of each move."""

SPACES: dict[str, dict[str, Any]] = {
    "discrete": {"action_space": {"type": "discrete", "actions": ["left", "down", "right", "up"]}},
    "text": {"sampling": {"max_tokens": 6}},
    "json": {
        "action_space": {"type": "json", "schema": {"enum": ["north", "south", 1, None]}},
        "sampling": {"max_tokens": 16},
    },
}
_BY_HAND = {"discrete": "left", "text": "by hand", "json": "south"}


class Player:
    """Plays episodes, and adds the answers to the ledger."""

    def __init__(self, client: AsyncClient, generator: random.Random, ledger: Ledger) -> None:
        self._client = client
        self._random = generator
        self._ledger = ledger
        self._num_forks = 0

    async def play(self, episode_id: str) -> None:
        """Plays one episode, call by call."""
        try:
            history = await self._open(episode_id)
            for _ in range(NUM_MOVES):
                await self._move(history)
            await self._maybe_end(history)
        except EpisodicError as error:
            self._ledger.refused(episode_id, error)

    async def play_batch(self, episode_ids: Sequence[str]) -> None:
        """Plays several episodes that act together, in one batch call for each step."""
        try:
            histories = [await self._open(episode_id) for episode_id in episode_ids]
            resources = [await self._client.run(calls.get_episode(name)) for name in episode_ids]
            episodes = [AsyncEpisode(self._client, resource) for resource in resources]
            for _ in range(NUM_MOVES):
                await self._act_together(histories, episodes)
        except EpisodicError as error:
            self._ledger.refused(episode_ids[0], error)

    async def _open(self, episode_id: str) -> History:
        space = self._random.choice(list(SPACES))
        await self._client.episode(episode_id=episode_id, instructions="Play on.", **SPACES[space])
        return self._register(History(episode_id, space))

    def _register(self, history: History) -> History:
        self._ledger.histories[history.episode_id] = history
        return history

    async def _move(self, history: History) -> None:
        (move,) = self._random.choices(list(_MOVES), list(_MOVES.values()))
        match move:
            case "act":
                await self._call(history, history.say(self._random))
            case "keyed":
                await self._call(history, history.say(self._random, key=f"key-{len(history.steps)}"))
            case "recorded":
                await self._call(history, history.say(self._random, recorded=_BY_HAND[history.space]))
            case "abandoned":
                await self._abandon(history)
            case "fork":
                await self._fork(history)
            case "read":
                await read(self._client, history, self._ledger)

    async def _call(self, history: History, sent: Sent) -> None:
        self._ledger.take(history, sent, await self._client.run(sent.call(history.episode_id)))

    async def _abandon(self, history: History) -> None:
        """Disconnects from a stream early, then sends the same act again. It may have been committed before."""
        sent, num_events = history.say(self._random), self._random.randrange(3)
        resource = EpisodeResource(episode_id=history.episode_id, status="active", step=sent.step)
        events = AsyncEpisode(self._client, resource).stream(sent.observation, **sent.fields)
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Act):
                        self._ledger.take(history, sent, event)
                        return
                    if not num_events:
                        break
                    num_events -= 1
        except (ConnectionFailed, Unavailable):
            pass  # the server cut the stream: the same as disconnecting from it
        await self._call(history, sent)

    async def _fork(self, history: History) -> None:
        """Forks the episode twice at a random step, and plays one act in each fork."""
        at_step = self._random.randint(0, len(history.steps))
        self._num_forks += 1
        names = [f"{history.episode_id}-{self._num_forks}{letter}" for letter in "ab"]
        await self._client.run(calls.fork(history.episode_id, names, at_step, None))
        for name in names:
            fork = self._register(history.fork(name, at_step))
            await self._call(fork, fork.say(self._random))

    async def _act_together(self, histories: Sequence[History], episodes: Sequence[AsyncEpisode]) -> None:
        sent = [history.say(self._random) for history in histories]
        items = [(episode, one.observation, one.fields) for episode, one in zip(episodes, sent, strict=True)]
        for history, one, answer in zip(histories, sent, await self._client.act_batch(items), strict=True):
            if not isinstance(answer, Act):
                raise answer
            self._ledger.take(history, one, answer)

    async def _maybe_end(self, history: History) -> None:
        match self._random.randrange(6):
            case 0:
                await self._call(history, history.say(self._random, terminated=True))
            case 1:
                reward = 0.5 if history.steps else None
                await self._client.run(calls.end_episode(history.episode_id, {"reward": reward}))
                history.ended_with = reward or 0.0
            case _:
                pass
