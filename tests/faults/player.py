"""Owns the load: episodes of every kind, played by callers who retry until they are answered, and hop between servers.

Whatever a call's fate, its player sends it again as it was until it is answered: then the history holds all that the
service may hold, and nothing else.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from service.client import Act, AsyncClient, AsyncEpisode, ConnectionFailed, EpisodicError, Retry, Unavailable, calls
from service.client.models import EpisodeResource
from tests.faults.checker import Finding, check, check_retry, remember
from tests.faults.history import History, Sent, Taken

NUM_MOVES = 6
BATCH_SIZE = 8
_PATIENCE = Retry(max_retries=100_000, total_s=400.0, max_s=1.0)
_CALL_LIMIT_S = 60.0
"""A call that hangs is a call that failed: it is sent again."""

Move = Literal["act", "keyed", "recorded", "abandoned", "fork"]
_MOVES: dict[Move, int] = {"act": 10, "keyed": 5, "recorded": 2, "abandoned": 3, "fork": 1}
"""How often each is made."""

SPACES: dict[str, dict[str, Any]] = {
    "discrete": {"action_space": {"type": "discrete", "actions": ["left", "down", "right", "up"]}},
    "text": {"sampling": {"max_tokens": 6}},
    "json": {
        "action_space": {"type": "json", "schema": {"enum": ["north", "south", 1, None]}},
        "sampling": {"max_tokens": 16},
    },
}
_BY_HAND = {"discrete": "left", "text": "by hand", "json": "south"}


@dataclass(slots=True)
class Ledger:
    """What all players were answered so far, and what went wrong."""

    histories: dict[str, History] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    num_acts: int = 0
    num_retried: int = 0
    """Calls that were sent more than once."""
    num_replayed: int = 0
    """Acts whose first answer was lost: the retry got it from the store."""

    def take(self, history: History, sent: Sent, answer: Act) -> None:
        history.take(sent, answer)
        self.num_acts += 1
        self.num_replayed += answer.replayed


class Hopping(httpx.AsyncBaseTransport):
    """Sends each attempt to one of the servers, drawn anew, and counts the calls that took more than one."""

    def __init__(self, urls: Sequence[str], generator: random.Random, ledger: Ledger) -> None:
        self._urls = [httpx.URL(url) for url in urls]
        self._random = generator
        self._ledger = ledger
        self._inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        num_sent = request.extensions["num_sent"] = request.extensions.get("num_sent", 0) + 1
        self._ledger.num_retried += num_sent == 2
        server = self._random.choice(self._urls)
        request.url = request.url.copy_with(host=server.host, port=server.port)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


@asynccontextmanager
async def calling(urls: Sequence[str], generator: random.Random, ledger: Ledger) -> AsyncIterator[AsyncClient]:
    transport = Hopping(urls, generator, ledger)
    async with AsyncClient(urls[0], retry=_PATIENCE, timeout_s=_CALL_LIMIT_S, transport=transport) as client:
        yield client


class Player:
    """Plays episodes and writes down in the ledger what it was answered."""

    def __init__(self, client: AsyncClient, generator: random.Random, ledger: Ledger) -> None:
        self._client = client
        self._random = generator
        self._ledger = ledger
        self._num_forks = 0

    async def play(self, episode_id: str) -> None:
        """One episode, call by call."""
        try:
            history = await self._open(episode_id)
            for _ in range(NUM_MOVES):
                await self._move(history)
            await self._maybe_end(history)
        except EpisodicError as error:
            self._refused(episode_id, error)

    async def play_batch(self, episode_ids: Sequence[str]) -> None:
        """Episodes that all act in one call, each time."""
        try:
            histories = [await self._open(episode_id) for episode_id in episode_ids]
            resources = [await self._client.run(calls.get_episode(name)) for name in episode_ids]
            episodes = [AsyncEpisode(self._client, resource) for resource in resources]
            for _ in range(NUM_MOVES):
                await self._act_together(histories, episodes)
        except EpisodicError as error:
            self._refused(episode_ids[0], error)

    async def _open(self, episode_id: str) -> History:
        space = self._random.choice(list(SPACES))
        await self._client.episode(episode_id=episode_id, instructions="Play on.", **SPACES[space])
        return self._known(History(episode_id, space))

    def _known(self, history: History) -> History:
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

    async def _call(self, history: History, sent: Sent) -> None:
        self._ledger.take(history, sent, await self._client.run(sent.call(history.episode_id)))

    async def _abandon(self, history: History) -> None:
        """Leaves a stream early; then the same act once more, which has been taken already or is taken now."""
        sent, num_heard = history.say(self._random), self._random.randrange(3)
        resource = EpisodeResource(episode_id=history.episode_id, status="active", step=sent.step)
        events = AsyncEpisode(self._client, resource).stream(sent.observation, **sent.fields)
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Act):
                        self._ledger.take(history, sent, event)
                        return
                    if not num_heard:
                        break
                    num_heard -= 1
        except (ConnectionFailed, Unavailable):
            pass  # cut off: the same as left
        await self._call(history, sent)

    async def _fork(self, history: History) -> None:
        """Two episodes that begin as this one did, and take a step each."""
        at_step = self._random.randint(0, len(history.steps))
        self._num_forks += 1
        names = [f"{history.episode_id}-{self._num_forks}{letter}" for letter in "ab"]
        await self._client.run(calls.fork(history.episode_id, names, at_step, None))
        for name in names:
            fork = self._known(history.fork(name, at_step))
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

    def _refused(self, episode_id: str, error: EpisodicError) -> None:
        self._ledger.findings.append(Finding("refused", episode_id, f"{type(error).__name__}: {error}"))


class Auditor:
    """Reads what the service keeps and holds it to the histories."""

    def __init__(self, client: AsyncClient, generator: random.Random, ledger: Ledger) -> None:
        self._client = client
        self._random = generator
        self._ledger = ledger

    async def audit(self, histories: Sequence[History], *, go_on: bool = False) -> None:
        """Each episode's record, the retry of one of its steps and, with `go_on`, a further act."""
        lanes = asyncio.Semaphore(16)

        async def one(history: History) -> None:
            async with lanes:
                try:
                    await self._audit(history, go_on=go_on)
                except EpisodicError as error:
                    said = f"{type(error).__name__}: {error}"
                    self._ledger.findings.append(Finding("refused", history.episode_id, said))

        await asyncio.gather(*map(one, histories))

    async def _audit(self, history: History, *, go_on: bool) -> None:
        await self._read(history)
        await self._retry(history)
        if go_on and not history.ended:
            sent = history.say(self._random)
            self._ledger.take(history, sent, await self._client.run(sent.call(history.episode_id)))
            await self._read(history)

    async def _read(self, history: History) -> None:
        stored = await self._client.run(calls.trajectory(history.episode_id, "steps"))
        tokens = await self._client.run(calls.trajectory(history.episode_id, "tokens"))
        found = check(history, stored, tokens)
        self._ledger.findings += found
        if not found:
            remember(history, tokens)

    async def _retry(self, history: History) -> None:
        own: list[Taken] = [*history.steps[history.first_own :], *([history.closing] if history.closing else [])]
        if own:
            taken = self._random.choice(own)
            again = await self._client.run(taken.sent.call(history.episode_id))
            self._ledger.findings += check_retry(history, taken, again)
