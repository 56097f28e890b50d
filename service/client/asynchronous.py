"""Owns the client for asyncio. `blocking` is the same for threads: the two differ in their I/O alone."""

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
        made = await self._client.run(calls.fork(self.id, new_ids(n), at_step, group))
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


class AsyncClient:
    """`Client` for asyncio: any number of episodes may act at the same time."""

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
        batch, attempts = Batch(acts), Attempts(self._retry)
        while True:
            batch.take(await self.run(batch.call()))
            wait_s = attempts.backoff_s() if batch.due else None
            if wait_s is None:
                return batch.results
            await asyncio.sleep(wait_s)

    async def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        return await self.run(calls.list_episodes(filters))

    async def episodes(self, **where: Unpack[EpisodeFilter]) -> AsyncGenerator[EpisodeResource]:
        """As `Client.episodes`."""
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
        """As `Client.export`."""
        return self.stream(calls.export(format, where), LineReader())

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
        await self.run(calls.ready(PROBE_TIMEOUT_S), until_ready(timeout_s))

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
                raise AssertionError("settle raises what is no success")
            await asyncio.sleep(wait_s)

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
