"""Code that both clients share: the state of an episode, the state of a batch, and the configuration of httpx."""

from __future__ import annotations

import inspect
import os
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypedDict, TypeVar, get_type_hints

import httpx
from uuid_utils import uuid7

from service.client import calls
from service.client.calls import ActFields, Call, Observation
from service.client.errors import ApiError, Unavailable
from service.client.models import Act, EpisodeResource
from service.client.retries import Retry

Owner = TypeVar("Owner")
F = TypeVar("F", bound=Callable[..., Any])
BatchItem = tuple[Owner, Observation | None] | tuple[Owner, Observation | None, ActFields]
"""An episode, its observation, and further fields of the act, such as {"reward": 1.0}."""

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 2.0
MAX_BATCH = 1024
"""The maximum number of acts in one request."""


class HttpOptions(TypedDict):
    base_url: str
    headers: dict[str, str]
    timeout: httpx.Timeout
    limits: httpx.Limits
    verify: ssl.SSLContext


class EpisodeState(Generic[Owner]):
    """The client's copy of an episode's state.

    `resource` is the last resource received, `step` the index of the next step, `done` whether the episode has ended.
    """

    def __init__(self, client: Owner, resource: EpisodeResource) -> None:
        self._client = client
        self._update(resource)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}, step={self.step}, done={self.done})"

    @property
    def id(self) -> str:
        return self.resource.episode_id

    def _update(self, resource: EpisodeResource) -> EpisodeResource:
        self.resource = resource
        self.step = resource.step
        self.done = resource.status == "ended"
        return resource

    def advance(self, act: Act) -> Act:
        """Advances `step` and `done` after an act."""
        self.done = act.done
        self.step = act.step if act.done else act.step + 1
        return act


class Batch:
    """A batch of acts in distinct episodes.

    `pending` has the indices of the acts to send: first all, then those that failed with a retryable error. The
    episodes advance only in `finish`: if a request fails before that, the caller can make the whole call again.
    """

    def __init__(self, acts: Sequence[BatchItem[Any]]) -> None:
        self._episodes: list[EpisodeState[Any]] = [item[0] for item in acts]
        self._items = [(item[0].id, item[0].step, item[1], item[2] if len(item) == 3 else ActFields()) for item in acts]
        self._results: dict[int, Act | ApiError] = {}
        self.pending = list(range(len(acts)))

    def parts(self) -> list[list[int]]:
        """The pending indices, in parts that each fit into one request."""
        return [self.pending[start : start + MAX_BATCH] for start in range(0, len(self.pending), MAX_BATCH)]

    def call(self, part: list[int]) -> Call[list[Act | ApiError]]:
        """The request for a part of the pending acts."""
        return calls.batch([self._items[index] for index in part])

    def take(self, part: list[int], results: list[Act | ApiError]) -> None:
        """Stores the results of a part. Its acts that are Unavailable stay pending."""
        received = dict(zip(part, results, strict=True))
        self._results |= received
        self.pending = [
            index for index in self.pending if index not in received or isinstance(received[index], Unavailable)
        ]

    def finish(self) -> list[Act | ApiError]:
        """Advances the episodes, and returns the latest result of each act, in order."""
        results = [self._results[index] for index in range(len(self._items))]
        for episode, result in zip(self._episodes, results, strict=True):
            if isinstance(result, Act):
                episode.advance(result)
        return results


def keywords(fields: type[Any]) -> Callable[[F], F]:
    """Shows the keys of a TypedDict as parameters in the signature of a function that takes them as keywords.

    Type checkers know them anyway; this is for help() and for the completion in notebooks.
    """

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
            for name, hint in get_type_hints(fields).items()
        ]
        setattr(function, "__signature__", signature.replace(parameters=[*own, *named]))  # noqa: B010 - not declared
        return function

    return show


def new_ids(n: int) -> list[str]:
    return [str(uuid7()) for _ in range(n)]


def http_options(base_url: str | None, api_key: str | None, timeout_s: float) -> HttpOptions:
    """The configuration of httpx. What is None is read from EPISODIC_URL and EPISODIC_API_KEY."""
    base_url = base_url or os.environ.get("EPISODIC_URL") or DEFAULT_URL
    api_key = api_key or os.environ.get("EPISODIC_API_KEY")
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}")
    return {
        "base_url": base_url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
        # Each in-flight act uses a connection, so a limit here would limit the number of concurrent episodes.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "verify": httpx.create_ssl_context(),
    }


def until_ready(timeout_s: float) -> Retry:
    """Retries that end only after `timeout_s` seconds."""
    return Retry(max_retries=1_000_000, total_s=timeout_s, first_s=0.2, max_s=1.0, fail_fast=False)
