"""The client for asyncio. `blocking` has the same client for threads; the two differ only in how they do I/O."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx
from uuid_utils import uuid7

from service.client import calls
from service.client.calls import ActFields, Call, EndFields, EpisodeFields, Filters, Observation, RecordFields
from service.client.errors import ApiError, ConnectionFailed, reading
from service.client.models import Act, EpisodePage, EpisodeResource, Feedback, Policy, Profile, TrajectoryFormat
from service.client.retries import Attempts, Outcome, Retry
from service.client.state import (
    DEFAULT_URL,
    PROBE_TIMEOUT_S,
    TIMEOUT_S,
    Batch,
    BatchItem,
    EpisodeState,
    http_options,
    new_ids,
    until_ready,
)
from service.client.streams import Event, EventReader, LineReader, Reader
from service.filters import EpisodeFilter

T = TypeVar("T")


class AsyncEpisode(EpisodeState["AsyncClient"]):
    """The asyncio version of `Episode`."""

    async def act(self, observation: Observation | None = None, **fields: Unpack[ActFields]) -> Act:
        """See `Episode.act`. If this call is cancelled, the act is aborted, unless its commit has already begun."""
        return self.advance(await self._client.run(calls.act(self.id, self.step, observation, fields)))

    async def stream(
        self, observation: Observation | None = None, **fields: Unpack[ActFields]
    ) -> AsyncGenerator[Event]:
        """See `Episode.stream`."""
        call = calls.stream_act(self.id, self.step, observation, fields)
        async with aclosing(self._client.stream(call, EventReader())) as events:
            async for event in events:
                yield self.advance(event) if isinstance(event, Act) else event

    async def record(self, action: Any, observation: Observation, **fields: Unpack[RecordFields]) -> Act:
        """See `Episode.record`."""
        return self.advance(await self._client.run(calls.record(self.id, self.step, observation, action, fields)))

    async def fork(self, n: int = 1, *, at_step: int | None = None, group: str | None = None) -> list[AsyncEpisode]:
        """See `Episode.fork`."""
        forks = await self._client.run(calls.fork(self.id, new_ids(n), at_step, group))
        return [AsyncEpisode(self._client, resource) for resource in forks]

    async def feedback(
        self, rating: int, comment: str | None = None, *, rater: str | None = None, step: int | None = None
    ) -> Feedback:
        """See `Episode.feedback`."""
        fields = {"rating": rating, "comment": comment, "rater": rater, "step": step}
        return await self._client.run(calls.feedback(self.id, fields))

    async def end(self, **fields: Unpack[EndFields]) -> EpisodeResource:
        """See `Episode.end`."""
        return self._update(await self._client.run(calls.end_episode(self.id, fields)))

    async def refresh(self) -> EpisodeResource:
        """See `Episode.refresh`."""
        return self._update(await self._client.run(calls.get_episode(self.id)))

    async def trajectory(self, format: TrajectoryFormat = "steps") -> Any:
        """See `Episode.trajectory`."""
        return await self._client.run(calls.trajectory(self.id, format))

    async def delete(self) -> None:
        """See `Episode.delete`."""
        await self._client.run(calls.delete_episode(self.id))


class AsyncClient:
    """The asyncio version of `Client`. Any number of episodes can act concurrently."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: Retry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry = retry or Retry()
        self._options = http_options(base_url, api_key, timeout_s)
        self._transport = transport
        self._requests = httpx.AsyncClient(transport=transport, **self._options)
        # Each request in flight uses its own httpx client. A shared one is slow, because httpcore's pool scans all of
        # its connections on every request: with 32 connections a request costs three times as much.
        self._idle = [self._requests]
        self._all = [self._requests]

    async def episode(self, *, episode_id: str | None = None, **fields: Unpack[EpisodeFields]) -> AsyncEpisode:
        """See `Client.episode`."""
        return AsyncEpisode(self, await self.run(calls.create_episode(episode_id or str(uuid7()), fields)))

    async def resume(self, episode_id: str) -> AsyncEpisode:
        """See `Client.resume`."""
        return AsyncEpisode(self, await self.run(calls.get_episode(episode_id)))

    async def act_batch(self, acts: Sequence[BatchItem[AsyncEpisode]]) -> list[Act | ApiError]:
        """See `Client.act_batch`."""
        batch, attempts = Batch(acts), Attempts(self._retry)
        while True:
            batch.take(await self.run(batch.call()))
            wait_s = attempts.backoff_s() if batch.pending else None
            if wait_s is None:
                return batch.results
            await asyncio.sleep(wait_s)

    async def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        """See `Client.list_episodes`."""
        return await self.run(calls.list_episodes(filters))

    async def episodes(self, **where: Unpack[EpisodeFilter]) -> AsyncGenerator[EpisodeResource]:
        """See `Client.episodes`."""
        page = await self.run(calls.list_episodes(Filters(**where)))
        while True:
            for episode in page.episodes:
                yield episode
            if page.next_cursor is None:
                return
            page = await self.run(calls.list_episodes(Filters(**where, cursor=page.next_cursor)))

    def export(
        self, format: TrajectoryFormat = "steps", **where: Unpack[EpisodeFilter]
    ) -> AsyncGenerator[dict[str, Any]]:
        """See `Client.export`."""
        return self.stream(calls.export(format, where), LineReader())

    async def profiles(self) -> list[Profile]:
        """See `Client.profiles`."""
        return await self.run(calls.profiles())

    async def policies(self) -> list[Policy]:
        """See `Client.policies`."""
        return await self.run(calls.policies())

    async def load_policy(self, name: str, path: str) -> Policy:
        """See `Client.load_policy`."""
        return await self.run(calls.load_policy(name, path))

    async def remove_policy(self, name: str) -> None:
        """See `Client.remove_policy`."""
        await self.run(calls.remove_policy(name))

    async def wait_ready(self, timeout_s: float = 300.0) -> None:
        """See `Client.wait_ready`."""
        await self.run(calls.ready(PROBE_TIMEOUT_S), until_ready(timeout_s))

    async def version(self) -> dict[str, Any]:
        """See `Client.version`."""
        return await self.run(calls.version())

    async def run(self, call: Call[T], retry: Retry | None = None) -> T:
        """See `Client.run`."""
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
        """See `Client.stream`."""
        http = self._take()
        try:
            response = await self._open_stream(http, call)
            try:
                async for chunk in response.aiter_bytes():
                    with reading(str(call)):
                        for value in reader.feed(chunk):
                            yield value
            except httpx.RequestError as error:
                raise ConnectionFailed(f"{call}: the connection failed while the response arrived: {error}") from error
            finally:
                await response.aclose()
        finally:
            self._idle.append(http)
        reader.end()

    async def _open_stream(self, http: httpx.AsyncClient, call: Call[Any]) -> httpx.Response:
        """Sends the call, with retries, until a successful response begins."""
        request, attempts = call.request(http), Attempts(self._retry, repeatable=call.repeatable)
        while True:
            outcome = await self._send(http, request, stream=True)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                call.settle(outcome)
                raise AssertionError("settle raises if the call did not succeed")
            await asyncio.sleep(wait_s)

    async def _send(self, http: httpx.AsyncClient, request: httpx.Request, *, stream: bool = False) -> Outcome:
        """One attempt. With `stream`, the body is still unread if the response is a success."""
        try:
            response = await http.send(request, stream=stream)
            if not response.is_success:
                await response.aread()
            return response
        except httpx.RequestError as error:
            return error

    def _take(self) -> httpx.AsyncClient:
        """An idle httpx client, or a new one if all are in use."""
        return self._idle.pop() if self._idle else self._open()

    def _open(self) -> httpx.AsyncClient:
        http = httpx.AsyncClient(transport=self._transport, **self._options)
        self._all.append(http)
        return http

    async def aclose(self) -> None:
        """Closes all connections."""
        for http in self._all:
            await http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()
