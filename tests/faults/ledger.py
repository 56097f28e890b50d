"""What all callers share: the ledger of their answers, and a client that sends calls to any of the servers."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from service.client import Act, AsyncClient, EpisodicError, Retry
from tests.faults.checker import Finding
from tests.faults.history import History, Sent

_RETRY = Retry(max_retries=100_000, total_s=400.0, max_s=1.0, fail_fast=False)
_CALL_LIMIT_S = 60.0
"""Timeout of one attempt. After it, the call is sent again."""


@dataclass(slots=True)
class Ledger:
    """All answers that the players received, and all findings."""

    histories: dict[str, History] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    num_acts: int = 0
    num_retried: int = 0
    """Calls that needed more than one attempt."""
    num_replayed: int = 0
    """Acts whose first answer was lost, so that a retry received the stored one."""

    def take(self, history: History, sent: Sent, answer: Act) -> None:
        history.take(sent, answer)
        self.num_acts += 1
        self.num_replayed += answer.replayed

    def refused(self, episode_id: str, error: EpisodicError) -> None:
        self.findings.append(Finding("refused", episode_id, f"{type(error).__name__}: {error}"))


class Hopping(httpx.AsyncBaseTransport):
    """Sends each attempt to a random server, and counts the calls that needed more than one attempt."""

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
async def calling(
    urls: Sequence[str], generator: random.Random, ledger: Ledger, api_key: str | None = None
) -> AsyncIterator[AsyncClient]:
    """A client that retries for longer than a server takes to start."""
    transport = Hopping(urls, generator, ledger)
    async with AsyncClient(urls[0], api_key, retry=_RETRY, timeout_s=_CALL_LIMIT_S, transport=transport) as client:
        yield client
