"""Owns the client in its two forms, blocking and asyncio, which differ in their I/O alone."""

from __future__ import annotations

import asyncio
import ssl
import time
from types import TracebackType
from typing import Any, Generic, Self, TypedDict, TypeVar, Unpack

import httpx
from uuid_utils import uuid7

from service.client import calls
from service.client.calls import ActFields, Call, EndFields, EpisodeFields, Filters, Observation
from service.client.models import Act, EpisodePage, EpisodeResource, TrajectoryFormat
from service.client.retries import Attempts, Outcome, Retry

T = TypeVar("T")
Owner = TypeVar("Owner")

DEFAULT_URL = "http://127.0.0.1:8000"


class _HttpOptions(TypedDict):
    base_url: str
    headers: dict[str, str]
    timeout: httpx.Timeout
    limits: httpx.Limits
    verify: ssl.SSLContext


class _Episode(Generic[Owner]):
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

    def _advance(self, act: Act) -> Act:
        self.done = act.done
        self.step = act.step if act.done else act.step + 1
        return act


class Episode(_Episode["Client"]):
    """One episode, acted in by one caller at a time."""

    def act(self, observation: Observation | None = None, **fields: Unpack[ActFields]) -> Act:
        """The policy's action for `observation`, which carries the reward of the action before.

        The step index goes along, so a repeated request, by the retries here or by calling this again with the same
        arguments after ConnectionFailed, takes the step once. Raises ValueError for NaN or infinity anywhere.
        """
        return self._advance(self._client.run(calls.act(self.id, self.step, observation, fields)))

    def end(self, **fields: Unpack[EndFields]) -> EpisodeResource:
        return self._see(self._client.run(calls.end_episode(self.id, fields)))

    def refresh(self) -> EpisodeResource:
        """Reads the episode again, with the next step index, for example after StepConflict."""
        return self._see(self._client.run(calls.get_episode(self.id)))

    def trajectory(self, format: TrajectoryFormat = "steps") -> Any:
        return self._client.run(calls.trajectory(self.id, format))

    def delete(self) -> None:
        self._client.run(calls.delete_episode(self.id))


class AsyncEpisode(_Episode["AsyncClient"]):
    """`Episode` for asyncio."""

    async def act(self, observation: Observation | None = None, **fields: Unpack[ActFields]) -> Act:
        """As `Episode.act`; a cancelled act is not committed unless its step already was."""
        return self._advance(await self._client.run(calls.act(self.id, self.step, observation, fields)))

    async def end(self, **fields: Unpack[EndFields]) -> EpisodeResource:
        return self._see(await self._client.run(calls.end_episode(self.id, fields)))

    async def refresh(self) -> EpisodeResource:
        return self._see(await self._client.run(calls.get_episode(self.id)))

    async def trajectory(self, format: TrajectoryFormat = "steps") -> Any:
        return await self._client.run(calls.trajectory(self.id, format))

    async def delete(self) -> None:
        await self._client.run(calls.delete_episode(self.id))


class Client:
    """Talks to one Episodic service at `base_url`.

    An attempt may wait `timeout_s` seconds for bytes to move; `retry` says when a call is sent again. `transport`
    replaces the network, as in httpx. Threads may share a client, each with episodes of its own.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retry = retry or Retry()
        self._http = httpx.Client(transport=transport, **_http_options(base_url, api_key, timeout_s))

    def episode(self, *, episode_id: str | None = None, **fields: Unpack[EpisodeFields]) -> Episode:
        """Begins an episode under an id made here, unless one is given."""
        return Episode(self, self.run(calls.create_episode(episode_id or str(uuid7()), fields)))

    def resume(self, episode_id: str) -> Episode:
        """Takes up an episode that exists, at its next step."""
        return Episode(self, self.run(calls.get_episode(episode_id)))

    def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        return self.run(calls.list_episodes(filters))

    def wait_ready(self, timeout_s: float = 300.0) -> None:
        """Returns once an act would be served. Raises Unavailable or ConnectionFailed after `timeout_s` seconds."""
        self.run(calls.ready(), _until_ready(timeout_s))

    def version(self) -> dict[str, Any]:
        return self.run(calls.version())

    def run(self, call: Call[T], retry: Retry | None = None) -> T:
        """Makes one call, retries included."""
        request = call.request(self._http)
        attempts = Attempts(retry or self._retry)
        while True:
            outcome = self._send(request)
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                return call.settle(outcome)
            time.sleep(wait_s)

    def _send(self, request: httpx.Request) -> Outcome:
        try:
            return self._http.send(request)
        except httpx.RequestError as error:
            return error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio: any number of episodes may act at the same time."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retry: Retry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry = retry or Retry()
        self._options = _http_options(base_url, api_key, timeout_s)
        self._transport = transport
        self._requests = httpx.AsyncClient(transport=transport, **self._options)
        # One httpx client for each request in flight: httpcore's pool looks at its every connection on every request,
        # which at 32 of them makes a request cost three times as much.
        self._idle = [self._requests]
        self._all = [self._requests]

    async def episode(self, *, episode_id: str | None = None, **fields: Unpack[EpisodeFields]) -> AsyncEpisode:
        return AsyncEpisode(self, await self.run(calls.create_episode(episode_id or str(uuid7()), fields)))

    async def resume(self, episode_id: str) -> AsyncEpisode:
        return AsyncEpisode(self, await self.run(calls.get_episode(episode_id)))

    async def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        return await self.run(calls.list_episodes(filters))

    async def wait_ready(self, timeout_s: float = 300.0) -> None:
        await self.run(calls.ready(), _until_ready(timeout_s))

    async def version(self) -> dict[str, Any]:
        return await self.run(calls.version())

    async def run(self, call: Call[T], retry: Retry | None = None) -> T:
        request = call.request(self._requests)
        attempts = Attempts(retry or self._retry)
        while True:
            outcome = await self._send(request)
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                return call.settle(outcome)
            await asyncio.sleep(wait_s)

    async def _send(self, request: httpx.Request) -> Outcome:
        http = self._idle.pop() if self._idle else self._open()
        try:
            return await http.send(request)
        except httpx.RequestError as error:
            return error
        finally:
            self._idle.append(http)

    def _open(self) -> httpx.AsyncClient:
        http = httpx.AsyncClient(transport=self._transport, **self._options)
        self._all.append(http)
        return http

    async def aclose(self) -> None:
        for http in self._all:
            await http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


def _http_options(base_url: str, api_key: str | None, timeout_s: float) -> _HttpOptions:
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"a base_url begins with http:// or https://, unlike {base_url!r}")
    return {
        "base_url": base_url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(timeout_s),
        # Each act in flight holds a connection: a cap here would be a hidden cap on concurrent episodes.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "verify": httpx.create_ssl_context(),
    }


def _until_ready(timeout_s: float) -> Retry:
    return Retry(max_retries=1_000_000, total_s=timeout_s, first_s=0.2, max_s=1.0)
