"""The client for asyncio. `blocking` has the same client for threads; the two differ only in how they do I/O."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat, TypeVar, Unpack

import httpx
from uuid_utils import uuid7

from service.client import calls
from service.client.calls import OMITTED, Call, Filters, JsonObject, Observation, Omitted
from service.client.errors import ApiError, ConnectionFailed, reading
from service.client.evaluation import Evaluation
from service.client.models import (
    Act,
    EpisodePage,
    EpisodeResource,
    Feedback,
    Policy,
    PolicyVersion,
    Profile,
    TrajectoryFormat,
)
from service.client.retries import Attempts, Link, Outcome, Retry
from service.client.state import (
    PROBE_TIMEOUT_S,
    TIMEOUT_S,
    Batch,
    BatchItem,
    EpisodeState,
    http_options,
    keywords,
    new_ids,
    until_ready,
)
from service.client.streams import Event, EventReader, LineReader, Reader
from service.filters import EpisodeFilter, EpisodeQuery, EvaluationQuery

T = TypeVar("T")


class AsyncEpisode(EpisodeState["AsyncClient"]):
    """The asyncio version of `Episode`."""

    async def act(
        self,
        observation: Observation | None = None,
        *,
        reward: SupportsFloat | None = None,
        terminated: bool = False,
        truncated: bool = False,
        success: bool | None = None,
        info: JsonObject | None = None,
        legal_actions: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> Act:
        """See `Episode.act`. If this call is cancelled, the act is aborted, unless its commit has already begun."""
        fields = calls.act_fields(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            info=info,
            legal_actions=legal_actions,
            timeout_s=timeout_s,
        )
        return self.advance(await self._client.run(calls.act(self.id, self.step, observation, fields)))

    async def stream(
        self,
        observation: Observation | None = None,
        *,
        reward: SupportsFloat | None = None,
        terminated: bool = False,
        truncated: bool = False,
        success: bool | None = None,
        info: JsonObject | None = None,
        legal_actions: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event]:
        """See `Episode.stream`."""
        fields = calls.act_fields(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            info=info,
            legal_actions=legal_actions,
            timeout_s=timeout_s,
        )
        call = calls.stream_act(self.id, self.step, observation, fields)
        async with aclosing(self._client.stream(call, EventReader())) as events:
            async for event in events:
                yield self.advance(event) if isinstance(event, Act) else event

    async def record(
        self,
        action: Any,
        observation: Observation,
        *,
        reward: SupportsFloat | None = None,
        terminated: bool = False,
        truncated: bool = False,
        success: bool | None = None,
        info: JsonObject | None = None,
        legal_actions: Sequence[str] | None = None,
    ) -> Act:
        """See `Episode.record`."""
        fields = calls.act_fields(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            info=info,
            legal_actions=legal_actions,
        )
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

    async def end(
        self,
        *,
        reward: SupportsFloat | None = None,
        terminated: bool = False,
        truncated: bool = False,
        success: bool | None = None,
        info: JsonObject | None = None,
    ) -> EpisodeResource:
        """See `Episode.end`."""
        fields = calls.act_fields(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            info=info,
        )
        return self._update(await self._client.run(calls.end_episode(self.id, fields)))

    async def refresh(self) -> EpisodeResource:
        """See `Episode.refresh`."""
        return self._update(await self._client.run(calls.get_episode(self.id)))

    async def trajectory(
        self, format: TrajectoryFormat = "steps", *, from_step: int | None = None, limit: int | None = None
    ) -> Any:
        """See `Episode.trajectory`."""
        return await self._client.run(calls.trajectory(self.id, format, from_step, limit))

    async def delete(self) -> None:
        """See `Episode.delete`."""
        await self._client.run(calls.delete_episode(self.id))


class AsyncClient:
    """The asyncio version of `Client`. Any number of episodes can act concurrently."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: Retry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry = retry or Retry()
        self._options = http_options(base_url, api_key, timeout_s)
        self._link = Link(self._options["base_url"])
        self._transport = transport
        self._requests = httpx.AsyncClient(transport=transport, **self._options)
        # Each request in flight uses its own httpx client. A shared one is slow, because httpcore's pool scans all of
        # its connections on every request: with 32 connections a request costs three times as much.
        self._idle = [self._requests]
        self._all = [self._requests]

    def __repr__(self) -> str:
        return f"AsyncClient({str(self._requests.base_url)!r})"

    async def episode(
        self,
        *,
        episode_id: str | None = None,
        profile: str | Omitted | None = OMITTED,
        instructions: str | Omitted = OMITTED,
        goal: str | Omitted | None = OMITTED,
        action_space: JsonObject | Omitted = OMITTED,
        sampling: JsonObject | Omitted | None = OMITTED,
        reasoning: JsonObject | Omitted | None = OMITTED,
        context: JsonObject | Omitted | None = OMITTED,
        policy: str | Omitted | None = OMITTED,
        policy_updates: Literal["pinned", "follow"] | Omitted = OMITTED,
        max_steps: int | Omitted | None = OMITTED,
        idle_ttl_s: float | Omitted | None = OMITTED,
        tags: Sequence[str] | Omitted = OMITTED,
        metadata: JsonObject | Omitted = OMITTED,
        group: str | Omitted | None = OMITTED,
    ) -> AsyncEpisode:
        """See `Client.episode`."""
        fields = calls.episode_fields(
            profile=profile,
            instructions=instructions,
            goal=goal,
            action_space=action_space,
            sampling=sampling,
            reasoning=reasoning,
            context=context,
            policy=policy,
            policy_updates=policy_updates,
            max_steps=max_steps,
            idle_ttl_s=idle_ttl_s,
            tags=tags,
            metadata=metadata,
            group=group,
        )
        return AsyncEpisode(self, await self.run(calls.create_episode(episode_id or str(uuid7()), fields)))

    async def resume(self, episode_id: str) -> AsyncEpisode:
        """See `Client.resume`."""
        return AsyncEpisode(self, await self.run(calls.get_episode(episode_id)))

    async def act_batch(self, acts: Sequence[BatchItem[AsyncEpisode]]) -> list[Act | ApiError]:
        """See `Client.act_batch`."""
        batch, attempts = Batch(acts), Attempts(self._retry, link=self._link)
        while batch.pending:
            for part in batch.parts():
                batch.take(part, await self.run(batch.call(part)))
            wait_s = attempts.backoff_s() if batch.pending else None
            if wait_s is None:
                break
            await asyncio.sleep(wait_s)
        return batch.finish()

    @keywords(Filters)
    async def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        """See `Client.list_episodes`."""
        return await self.run(calls.list_episodes(filters))

    @keywords(EpisodeQuery)
    async def episodes(self, **where: Unpack[EpisodeQuery]) -> AsyncGenerator[EpisodeResource]:
        """See `Client.episodes`."""
        page = await self.run(calls.list_episodes(Filters(**where)))
        while True:
            for episode in page.episodes:
                yield episode
            if page.next_cursor is None:
                return
            page = await self.run(calls.list_episodes(Filters(**where, cursor=page.next_cursor)))

    @keywords(EpisodeFilter)
    def export(
        self, format: TrajectoryFormat = "steps", **where: Unpack[EpisodeFilter]
    ) -> AsyncGenerator[dict[str, Any]]:
        """See `Client.export`."""
        return self.stream(calls.export(format, where), LineReader())

    @keywords(EvaluationQuery)
    async def evaluation(self, **query: Unpack[EvaluationQuery]) -> Evaluation:
        """See `Client.evaluation`."""
        return await self.run(calls.evaluation(query))

    async def profiles(self) -> list[Profile]:
        """See `Client.profiles`."""
        return await self.run(calls.profiles())

    async def policies(self) -> list[Policy]:
        """See `Client.policies`."""
        return await self.run(calls.policies())

    async def policy_versions(self) -> list[PolicyVersion]:
        """See `Client.policy_versions`."""
        return await self.run(calls.policy_versions())

    async def load_policy(
        self,
        name: str,
        path: str | None = None,
        *,
        version: str | None = None,
        alias: bool = True,
        parent: str | None = None,
        round: int | None = None,
        evaluation: JsonObject | None = None,
    ) -> PolicyVersion:
        """See `Client.load_policy`."""
        fields = {"path": path, "version": version, "alias": alias, "parent": parent, "round": round}
        return await self.run(calls.load_policy(name, {**fields, "evaluation": evaluation}))

    async def upload_policy(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        alias: bool = True,
        parent: str | None = None,
        round: int | None = None,
    ) -> PolicyVersion:
        """See `Client.upload_policy`."""
        fields = {"alias": alias, "parent": parent, "round": round}
        return await self.run(await asyncio.to_thread(calls.upload_policy, name, Path(folder), fields))

    async def roll_back_policy(self, name: str) -> PolicyVersion:
        """See `Client.roll_back_policy`."""
        return await self.run(calls.roll_back_policy(name))

    async def set_default_policy(self, policy: str | None) -> str:
        """See `Client.set_default_policy`."""
        return await self.run(calls.set_default_policy(policy))

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
        attempts = Attempts(retry or self._retry, repeatable=call.repeatable, link=self._link)
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
        attempts = Attempts(self._retry, repeatable=call.repeatable, link=self._link)
        while True:
            num_values = 0
            try:
                async with aclosing(self._stream_once(call, reader, attempts)) as values:
                    async for value in values:
                        num_values += 1
                        yield value
                return
            except ApiError as error:
                wait_s = None if num_values else attempts.wait_after_event_s(error.status)
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)

    async def _stream_once(self, call: Call[Any], reader: Reader[T], attempts: Attempts) -> AsyncGenerator[T]:
        http = self._take()
        try:
            response = await self._open_stream(http, call, attempts)
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

    async def _open_stream(self, http: httpx.AsyncClient, call: Call[Any], attempts: Attempts) -> httpx.Response:
        """Sends the call, with retries, until a successful response begins."""
        request = call.request(http)
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
