"""Owns the client in its two forms, blocking and asyncio, which differ in their I/O alone."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
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
from service.client.errors import ApiError, ConnectionFailed, Unavailable, reading
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
from service.client.streams import Event, EventReader, LineReader, Reader

T = TypeVar("T")
Owner = TypeVar("Owner")
BatchItem = tuple[Owner, Observation | None, ActFields]
"""An episode, what it observes, and further fields of the act."""

DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 2.0


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

    def stream(self, observation: Observation | None = None, **fields: Unpack[ActFields]) -> Generator[Event]:
        """As `act`, with what the policy writes as it writes it; the act comes last. Closing it early, as
        `with contextlib.closing(episode.stream(...)) as events` does, aborts the act."""
        call = calls.stream_act(self.id, self.step, observation, fields)
        with closing(self._client.stream(call, EventReader())) as events:
            for event in events:
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
        call = calls.stream_act(self.id, self.step, observation, fields)
        async with aclosing(self._client.stream(call, EventReader())) as events:
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

    An attempt may wait `timeout_s` seconds for bytes to move: an act that takes longer is aborted. `retry` says when a
    call is sent again. `transport` replaces the network, as in httpx. Threads may share a client, each with episodes of
    its own.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_s: float = _TIMEOUT_S,
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
        batch, attempts = _Batch(acts), Attempts(self._retry)
        while True:
            batch.take(self.run(batch.call()))
            wait_s = attempts.backoff_s() if batch.due else None
            if wait_s is None:
                return batch.results
            time.sleep(wait_s)

    def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        return self.run(calls.list_episodes(filters))

    def episodes(self, **labels: Unpack[Labels]) -> Generator[EpisodeResource]:
        """Every episode with these labels, newest first, page by page."""
        page = self.run(calls.list_episodes(Filters(**labels)))
        while True:
            yield from page.episodes
            if page.next_cursor is None:
                return
            page = self.run(calls.list_episodes(Filters(**labels, cursor=page.next_cursor)))

    def export(self, format: TrajectoryFormat = "steps", **labels: Unpack[Labels]) -> Generator[dict[str, Any]]:
        """Finished trajectories (or those of another status), newest first, one in memory at a time. An export that was
        cut off raises ConnectionFailed."""
        return self.stream(calls.export(format, labels), LineReader())

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
        self.run(calls.ready(_PROBE_TIMEOUT_S), _until_ready(timeout_s))

    def version(self) -> dict[str, Any]:
        return self.run(calls.version())

    def run(self, call: Call[T], retry: Retry | None = None) -> T:
        """Makes one call, retries included."""
        request = call.request(self._http)
        attempts = Attempts(retry or self._retry, repeatable=call.repeatable)
        while True:
            outcome = self._send(request)
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                return call.settle(outcome)
            time.sleep(wait_s)

    def stream(self, call: Call[Any], reader: Reader[T]) -> Generator[T]:
        """Makes one call and reads what streams back; until the first byte of it comes, retries as `run` does."""
        with closing(self._opened(call)) as answer:
            try:
                for chunk in answer.iter_bytes():
                    with reading(str(call)):
                        yield from reader.feed(chunk)
            except httpx.RequestError as error:
                raise ConnectionFailed(f"{call} was cut off: {error}") from error
        reader.end()

    def _opened(self, call: Call[Any]) -> httpx.Response:
        request, attempts = call.request(self._http), Attempts(self._retry, repeatable=call.repeatable)
        while True:
            outcome = self._send(request, stream=True)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                call.settle(outcome)
            time.sleep(wait_s or 0.0)

    def _send(self, request: httpx.Request, *, stream: bool = False) -> Outcome:
        """The response; one of a stream is read already where it is no success."""
        try:
            response = self._http.send(request, stream=stream)
            if not response.is_success:
                response.read()
            return response
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
        timeout_s: float = _TIMEOUT_S,
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
        batch, attempts = _Batch(acts), Attempts(self._retry)
        while True:
            batch.take(await self.run(batch.call()))
            wait_s = attempts.backoff_s() if batch.due else None
            if wait_s is None:
                return batch.results
            await asyncio.sleep(wait_s)

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

    def export(self, format: TrajectoryFormat = "steps", **labels: Unpack[Labels]) -> AsyncGenerator[dict[str, Any]]:
        """As `Client.export`."""
        return self.stream(calls.export(format, labels), LineReader())

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
        await self.run(calls.ready(_PROBE_TIMEOUT_S), _until_ready(timeout_s))

    async def version(self) -> dict[str, Any]:
        return await self.run(calls.version())

    async def run(self, call: Call[T], retry: Retry | None = None) -> T:
        request = call.request(self._requests)
        attempts = Attempts(retry or self._retry, repeatable=call.repeatable)
        while True:
            http = self._take()
            try:
                outcome = await self._send(http, request)
            finally:
                self._idle.append(http)
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                return call.settle(outcome)
            await asyncio.sleep(wait_s)

    async def stream(self, call: Call[Any], reader: Reader[T]) -> AsyncGenerator[T]:
        """As `Client.stream`."""
        http = self._take()
        try:
            answer = await self._opened(http, call)
            try:
                async for chunk in answer.aiter_bytes():
                    with reading(str(call)):
                        for value in reader.feed(chunk):
                            yield value
            except httpx.RequestError as error:
                raise ConnectionFailed(f"{call} was cut off: {error}") from error
            finally:
                await answer.aclose()
        finally:
            self._idle.append(http)
        reader.end()

    async def _opened(self, http: httpx.AsyncClient, call: Call[Any]) -> httpx.Response:
        request, attempts = call.request(http), Attempts(self._retry, repeatable=call.repeatable)
        while True:
            outcome = await self._send(http, request, stream=True)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                call.settle(outcome)
            await asyncio.sleep(wait_s or 0.0)

    async def _send(self, http: httpx.AsyncClient, request: httpx.Request, *, stream: bool = False) -> Outcome:
        try:
            response = await http.send(request, stream=stream)
            if not response.is_success:
                await response.aread()
            return response
        except httpx.RequestError as error:
            return error

    def _take(self) -> httpx.AsyncClient:
        return self._idle.pop() if self._idle else self._open()

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


class _Batch:
    """Acts of distinct episodes on their way; those that met a passing problem are `due` again."""

    def __init__(self, acts: Sequence[BatchItem[Any]]) -> None:
        self._episodes: list[_Episode[Any]] = [episode for episode, _, _ in acts]
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


def _http_options(base_url: str, api_key: str | None, timeout_s: float) -> _HttpOptions:
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


def _until_ready(timeout_s: float) -> Retry:
    return Retry(max_retries=1_000_000, total_s=timeout_s, first_s=0.2, max_s=1.0)
