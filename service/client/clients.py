"""Owns the client in its two forms, blocking and asyncio, which differ in their I/O alone."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Generic, Self, TypedDict, TypeVar, Unpack

import httpx
from uuid_utils import uuid7

from service.client import calls
from service.client.calls import (
    ActFields,
    Call,
    EndFields,
    EpisodeFields,
    Filters,
    Labels,
    Observation,
    RecordFields,
)
from service.client.errors import ApiError, ConnectionFailed
from service.client.models import (
    Act,
    EpisodePage,
    EpisodeResource,
    Feedback,
    Policy,
    Profile,
    TrajectoryFormat,
)
from service.client.retries import Attempts, Outcome, Retry
from service.client.streams import Event, EventReader

T = TypeVar("T")
Owner = TypeVar("Owner")
BatchItem = tuple[Owner, Observation | None, ActFields]
"""An episode, what it observes, and further fields of the act."""

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

    def advance(self, act: Act) -> Act:
        """Takes over an act's answer: the next step is the one after it."""
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
        return self.advance(self._client.run(calls.act(self.id, self.step, observation, fields)))

    def stream(self, observation: Observation | None = None, **fields: Unpack[ActFields]) -> Iterator[Event]:
        """As `act`, with what the policy writes as it writes it; the act comes last. Leaving early aborts the act."""
        for event in self._client.stream(calls.stream_act(self.id, self.step, observation, fields)):
            yield self.advance(event) if isinstance(event, Act) else event

    def record(self, action: Any, observation: Observation, **fields: Unpack[RecordFields]) -> Act:
        """Records an action that a human or another policy chose for `observation`, as the step."""
        return self.advance(self._client.run(calls.record(self.id, self.step, observation, action, fields)))

    def fork(self, n: int = 1, *, at_step: int | None = None, group: str | None = None) -> list[Episode]:
        """n episodes that share this one's history up to `at_step` (default: now) and go on from there."""
        made = self._client.run(calls.fork(self.id, _new_ids(n), at_step, group))
        return [Episode(self._client, resource) for resource in made]

    def feedback(
        self, rating: int, comment: str | None = None, *, rater: str | None = None, step: int | None = None
    ) -> Feedback:
        """A human's rating, 1 to 5, of a step or of the episode; a named rater's newer one replaces the older."""
        said = {"rating": rating, "comment": comment, "rater": rater, "step": step}
        return self._client.run(calls.feedback(self.id, said))

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
        return self.advance(await self._client.run(calls.act(self.id, self.step, observation, fields)))

    async def stream(
        self, observation: Observation | None = None, **fields: Unpack[ActFields]
    ) -> AsyncGenerator[Event]:
        """As `Episode.stream`."""
        async with aclosing(self._client.stream(calls.stream_act(self.id, self.step, observation, fields))) as events:
            async for event in events:
                yield self.advance(event) if isinstance(event, Act) else event

    async def record(self, action: Any, observation: Observation, **fields: Unpack[RecordFields]) -> Act:
        """As `Episode.record`."""
        return self.advance(await self._client.run(calls.record(self.id, self.step, observation, action, fields)))

    async def fork(self, n: int = 1, *, at_step: int | None = None, group: str | None = None) -> list[AsyncEpisode]:
        """As `Episode.fork`."""
        made = await self._client.run(calls.fork(self.id, _new_ids(n), at_step, group))
        return [AsyncEpisode(self._client, resource) for resource in made]

    async def feedback(
        self, rating: int, comment: str | None = None, *, rater: str | None = None, step: int | None = None
    ) -> Feedback:
        """As `Episode.feedback`."""
        said = {"rating": rating, "comment": comment, "rater": rater, "step": step}
        return await self._client.run(calls.feedback(self.id, said))

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

    def act_batch(self, acts: Sequence[BatchItem[Episode]]) -> list[Act | ApiError]:
        """Acts in distinct episodes at once: (episode, observation, further fields of an act) each. Answers in order;
        an act that failed is the error it met, and its episode stays where it was."""
        results = self.run(calls.batch([(e.id, e.step, observation, fields) for e, observation, fields in acts]))
        return _advanced([item[0] for item in acts], results)

    def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        return self.run(calls.list_episodes(filters))

    def episodes(self, **labels: Unpack[Labels]) -> Iterator[EpisodeResource]:
        """Every episode with these labels, newest first, page by page."""
        page = self.run(calls.list_episodes(Filters(**labels)))
        while True:
            yield from page.episodes
            if page.next_cursor is None:
                return
            page = self.run(calls.list_episodes(Filters(**labels, cursor=page.next_cursor)))

    def export(self, format: TrajectoryFormat = "steps", **labels: Unpack[Labels]) -> Iterator[dict[str, Any]]:
        """Finished trajectories (or those of another status), newest first, one in memory at a time. An export that was
        cut off raises ConnectionFailed."""
        call = calls.export(format, labels)
        try:
            with self._http.stream("GET", call.path) as response:
                if response.is_error:
                    response.read()
                    call.settle(response)
                yield from (json.loads(line) for line in response.iter_lines())
        except httpx.RequestError as error:
            raise ConnectionFailed(f"the export was cut off: {error}") from error

    def profiles(self) -> list[Profile]:
        """The presets that an episode can name."""
        return self.run(calls.profiles())

    def policies(self) -> list[Policy]:
        """The base model, then its adapters."""
        return self.run(calls.policies())

    def load_policy(self, name: str, path: str) -> Policy:
        """Loads a LoRA adapter from a folder of the service's, or puts another in its place."""
        return self.run(calls.load_policy(name, path))

    def remove_policy(self, name: str) -> None:
        self.run(calls.remove_policy(name))

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

    def stream(self, call: Call[Act]) -> Generator[Event]:
        """Makes one call and reads its events; until the first of them comes, retries as `run` does."""
        request, attempts = call.request(self._http), Attempts(self._retry)
        while True:
            outcome = self._send(request, stream=True)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                break
            if isinstance(outcome, httpx.Response):
                outcome.read()
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                call.settle(outcome)
                return
            time.sleep(wait_s)
        reader = EventReader()
        try:
            for chunk in outcome.iter_bytes():
                yield from reader.feed(chunk)
        except httpx.RequestError as error:
            raise ConnectionFailed(f"the stream was cut off: {error}") from error
        finally:
            outcome.close()
        reader.end()

    def _send(self, request: httpx.Request, *, stream: bool = False) -> Outcome:
        try:
            return self._http.send(request, stream=stream)
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

    async def act_batch(self, acts: Sequence[BatchItem[AsyncEpisode]]) -> list[Act | ApiError]:
        """As `Client.act_batch`."""
        results = await self.run(calls.batch([(e.id, e.step, observation, fields) for e, observation, fields in acts]))
        return _advanced([item[0] for item in acts], results)

    async def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        return await self.run(calls.list_episodes(filters))

    async def episodes(self, **labels: Unpack[Labels]) -> AsyncGenerator[EpisodeResource]:
        """As `Client.episodes`."""
        page = await self.run(calls.list_episodes(Filters(**labels)))
        while True:
            for episode in page.episodes:
                yield episode
            if page.next_cursor is None:
                return
            page = await self.run(calls.list_episodes(Filters(**labels, cursor=page.next_cursor)))

    async def export(
        self, format: TrajectoryFormat = "steps", **labels: Unpack[Labels]
    ) -> AsyncGenerator[dict[str, Any]]:
        """As `Client.export`."""
        call = calls.export(format, labels)
        try:
            async with self._requests.stream("GET", call.path) as response:
                if response.is_error:
                    await response.aread()
                    call.settle(response)
                async for line in response.aiter_lines():
                    yield json.loads(line)
        except httpx.RequestError as error:
            raise ConnectionFailed(f"the export was cut off: {error}") from error

    async def profiles(self) -> list[Profile]:
        return await self.run(calls.profiles())

    async def policies(self) -> list[Policy]:
        return await self.run(calls.policies())

    async def load_policy(self, name: str, path: str) -> Policy:
        """As `Client.load_policy`."""
        return await self.run(calls.load_policy(name, path))

    async def remove_policy(self, name: str) -> None:
        await self.run(calls.remove_policy(name))

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

    async def stream(self, call: Call[Act]) -> AsyncGenerator[Event]:
        """As `Client.stream`."""
        http = self._idle.pop() if self._idle else self._open()
        try:
            outcome = await self._opened(http, call)
            reader = EventReader()
            try:
                async for chunk in outcome.aiter_bytes():
                    for event in reader.feed(chunk):
                        yield event
            except httpx.RequestError as error:
                raise ConnectionFailed(f"the stream was cut off: {error}") from error
            finally:
                await outcome.aclose()
            reader.end()
        finally:
            self._idle.append(http)

    async def _opened(self, http: httpx.AsyncClient, call: Call[Act]) -> httpx.Response:
        request, attempts = call.request(http), Attempts(self._retry)
        while True:
            outcome: Outcome
            try:
                outcome = await http.send(request, stream=True)
                if outcome.is_success:
                    return outcome
                await outcome.aread()
            except httpx.RequestError as error:
                outcome = error
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                call.settle(outcome)
                raise ConnectionFailed("the answer is neither a stream nor a problem")
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


def _new_ids(n: int) -> list[str]:
    return [str(uuid7()) for _ in range(n)]


def _advanced(episodes: Sequence[_Episode[Any]], results: list[Act | ApiError]) -> list[Act | ApiError]:
    for episode, result in zip(episodes, results, strict=True):
        if isinstance(result, Act):
            episode.advance(result)
    return results


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
