"""The audit: compares the stored episodes with the callers' histories and with what earlier audits read."""

import asyncio
import random
from collections.abc import Sequence

from service.client import AsyncClient, EpisodicError, calls
from tests.faults.checker import check, check_retry, remember
from tests.faults.history import History, Taken
from tests.faults.ledger import Ledger

_NUM_LANES = 16


async def read(client: AsyncClient, history: History, ledger: Ledger) -> None:
    """Compares the stored episode with its history, and remembers its tokens. No act may be in flight meanwhile."""
    stored = await client.run(calls.trajectory(history.episode_id, "steps", None, None))
    tokens = await client.run(calls.trajectory(history.episode_id, "tokens", None, None))
    found = check(history, stored, tokens)
    ledger.findings += found
    if not found:
        remember(history, tokens)


class Auditor:
    """Audits episodes, and adds the findings to the ledger."""

    def __init__(self, client: AsyncClient, generator: random.Random, ledger: Ledger) -> None:
        self._client = client
        self._random = generator
        self._ledger = ledger

    async def audit(self, histories: Sequence[History], *, go_on: bool = False) -> None:
        """Checks each stored episode and the retry of one of its steps. With `go_on`, it also plays one more act."""
        lanes = asyncio.Semaphore(_NUM_LANES)

        async def one(history: History) -> None:
            async with lanes:
                try:
                    await self._audit(history, go_on=go_on)
                except EpisodicError as error:
                    self._ledger.refused(history.episode_id, error)

        await asyncio.gather(*map(one, histories))

    async def _audit(self, history: History, *, go_on: bool) -> None:
        await read(self._client, history, self._ledger)
        await self._retry(history)
        if go_on and not history.ended:
            sent = history.say(self._random)
            self._ledger.take(history, sent, await self._client.run(sent.call(history.episode_id)))
            await read(self._client, history, self._ledger)

    async def _retry(self, history: History) -> None:
        own: list[Taken] = [*history.steps[history.first_own :], *([history.closing] if history.closing else [])]
        if own:
            taken = self._random.choice(own)
            again = await self._client.run(taken.sent.call(history.episode_id))
            self._ledger.findings += check_retry(history, taken, again)
