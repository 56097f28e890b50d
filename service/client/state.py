"""Owns what both forms of the client are made of: where an episode is, a batch on its way, how HTTP is set up."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any, Generic, TypedDict, TypeVar

import httpx
from uuid_utils import uuid7

from service.client import calls
from service.client.calls import ActFields, Call, Observation
from service.client.errors import ApiError, Unavailable
from service.client.models import Act, EpisodeResource
from service.client.retries import Retry

Owner = TypeVar("Owner")
BatchItem = tuple[Owner, Observation | None, ActFields]
"""An episode, what it observes, and further fields of the act."""

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 2.0


class HttpOptions(TypedDict):
    base_url: str
    headers: dict[str, str]
    timeout: httpx.Timeout
    limits: httpx.Limits
    verify: ssl.SSLContext


class EpisodeState(Generic[Owner]):
    """What the client knows of an episode: the last resource seen, the index of the next step, whether it ended."""

    def __init__(self, client: Owner, resource: EpisodeResource) -> None:
        self._client = client
        self._see(resource)

    @property
    def id(self) -> str:
        return self.resource.episode_id

    def _see(self, resource: EpisodeResource) -> EpisodeResource:
        self.resource = resource
        self.step = resource.step
        self.done = resource.status == "ended"
        return resource

    def advance(self, act: Act) -> Act:
        """Takes over an act's answer: the next step is the one after it."""
        self.done = act.done
        self.step = act.step if act.done else act.step + 1
        return act


class Batch:
    """Acts of distinct episodes on their way; those that met a passing problem are `due` again."""

    def __init__(self, acts: Sequence[BatchItem[Any]]) -> None:
        self._episodes: list[EpisodeState[Any]] = [episode for episode, _, _ in acts]
        self._items = [(episode.id, episode.step, observation, fields) for episode, observation, fields in acts]
        self._results: dict[int, Act | ApiError] = {}
        self.due = list(range(len(acts)))

    @property
    def results(self) -> list[Act | ApiError]:
        return [self._results[place] for place in range(len(self._items))]

    def call(self) -> Call[list[Act | ApiError]]:
        return calls.batch([self._items[place] for place in self.due])

    def take(self, results: list[Act | ApiError]) -> None:
        found = dict(zip(self.due, results, strict=True))
        self._results |= found
        for place, result in found.items():
            if isinstance(result, Act):
                self._episodes[place].advance(result)
        self.due = [place for place, result in found.items() if isinstance(result, Unavailable)]


def new_ids(n: int) -> list[str]:
    return [str(uuid7()) for _ in range(n)]


def http_options(base_url: str, api_key: str | None, timeout_s: float) -> HttpOptions:
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"a base_url begins with http:// or https://, unlike {base_url!r}")
    return {
        "base_url": base_url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
        # Each act in flight holds a connection: a cap here would be a hidden cap on concurrent episodes.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "verify": httpx.create_ssl_context(),
    }


def until_ready(timeout_s: float) -> Retry:
    return Retry(max_retries=1_000_000, total_s=timeout_s, first_s=0.2, max_s=1.0)
