"""The blocking client. `asynchronous` has the same client for asyncio; the two differ only in how they do I/O."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
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


class Episode(EpisodeState["Client"]):
    """One episode. Only one caller at a time may act in it."""

    def act(
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
        """Sends an observation and returns the policy's action.

        `reward` is for the previous action. With `terminated` or `truncated` the episode ends, and no action is chosen;
        `success` says whether its task was completed. `info` is stored, but the policy does not see it. `legal_actions`
        restricts a discrete action space. `timeout_s` is the deadline in seconds.

        The request names the step index. A repeated request therefore takes the step only once, whether the client
        retries it or you call `act` again with the same arguments after ConnectionFailed.

        Raises EpisodicError, and ValueError if an argument contains NaN or infinity, which JSON does not have.
        """
        fields = calls.act_fields(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            info=info,
            legal_actions=legal_actions,
            timeout_s=timeout_s,
        )
        return self.advance(self._client.run(calls.act(self.id, self.step, observation, fields)))

    def stream(
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
    ) -> Generator[Event]:
        """Like `act`, but yields a `Delta` for each piece of text as soon as the policy produces it, then the `Act`.

        Closing the generator early aborts the act: `with contextlib.closing(episode.stream(...)) as events`.
        """
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
        with closing(self._client.stream(call, EventReader())) as events:
            for event in events:
                yield self.advance(event) if isinstance(event, Act) else event

    def record(
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
        """Stores an action that a human or another policy chose for `observation` as the next step."""
        fields = calls.act_fields(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            info=info,
            legal_actions=legal_actions,
        )
        return self.advance(self._client.run(calls.record(self.id, self.step, observation, action, fields)))

    def fork(self, n: int = 1, *, at_step: int | None = None, group: str | None = None) -> list[Episode]:
        """Creates n episodes that share this episode's history up to step `at_step` (default: the current step)."""
        forks = self._client.run(calls.fork(self.id, new_ids(n), at_step, group))
        return [Episode(self._client, resource) for resource in forks]

    def feedback(
        self, rating: int, comment: str | None = None, *, rater: str | None = None, step: int | None = None
    ) -> Feedback:
        """Stores a human's rating, 1 to 5, of a step or (without `step`) of the episode.

        A second rating by the same `rater` replaces the first. Ratings without a rater are all kept.
        """
        fields = {"rating": rating, "comment": comment, "rater": rater, "step": step}
        return self._client.run(calls.feedback(self.id, fields))

    def end(
        self,
        *,
        reward: SupportsFloat | None = None,
        terminated: bool = False,
        truncated: bool = False,
        success: bool | None = None,
        info: JsonObject | None = None,
    ) -> EpisodeResource:
        """Ends the episode. `reward` is for the last action. An episode that has already ended stays as it is.

        The stop reason is `aborted` if neither `terminated` nor `truncated` is true.
        """
        fields = calls.act_fields(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            info=info,
        )
        return self._update(self._client.run(calls.end_episode(self.id, fields)))

    def refresh(self) -> EpisodeResource:
        """Reads the episode again, for example after StepConflict, and updates `step` to the next step index."""
        return self._update(self._client.run(calls.get_episode(self.id)))

    def trajectory(
        self, format: TrajectoryFormat = "steps", *, from_step: int | None = None, limit: int | None = None
    ) -> Any:
        """The episode's trajectory as JSON.

        `from_step` and `limit` select a page of the formats `steps` and `messages`: at most `limit` steps. Its
        `next_step` is the `from_step` of the next page, or None.
        """
        return self._client.run(calls.trajectory(self.id, format, from_step, limit))

    def delete(self) -> None:
        """Deletes the episode."""
        self._client.run(calls.delete_episode(self.id))


class Client:
    """A client of the Episodic service at `base_url`, with an API key if the service needs one.

    Their defaults are the environment variables EPISODIC_URL and EPISODIC_API_KEY, and for the URL DEFAULT_URL.
    `timeout_s` is the inactivity timeout of an attempt in seconds. If no data arrives for this time, the client
    disconnects and the act is aborted. `retry` decides when a call is sent again. `transport` replaces the network, as
    in httpx. Threads can share a client, but not an episode.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retry = retry or Retry()
        options = http_options(base_url, api_key, timeout_s)
        self._link = Link(options["base_url"])
        self._http = httpx.Client(transport=transport, **options)

    def __repr__(self) -> str:
        return f"Client({str(self._http.base_url)!r})"

    def episode(
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
    ) -> Episode:
        """Opens an episode. Without `episode_id`, the client generates one (a UUID of version 7).

        A parameter that is left out has the profile's value, or else the service's default. None is sent as null, which
        removes the profile's value.
        """
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
        return Episode(self, self.run(calls.create_episode(episode_id or str(uuid7()), fields)))

    def resume(self, episode_id: str) -> Episode:
        """Continues an existing episode at its next step. Raises EpisodeNotFound."""
        return Episode(self, self.run(calls.get_episode(episode_id)))

    def act_batch(self, acts: Sequence[BatchItem[Episode]]) -> list[Act | ApiError]:
        """Acts in several distinct episodes with one request, or with one for every 1,024 of them.

        Each item is an episode, its observation and, optionally, a dict with further arguments of `Episode.act`, for
        example `(episode, "row 0", {"reward": 1.0})`. Returns the results in the same order.
        If an act failed, its result is the error, and its episode stays at the same step.
        """
        batch, attempts = Batch(acts), Attempts(self._retry, link=self._link)
        while batch.pending:
            for part in batch.parts():
                batch.take(part, self.run(batch.call(part)))
            wait_s = attempts.backoff_s() if batch.pending else None
            if wait_s is None:
                break
            time.sleep(wait_s)
        return batch.finish()

    @keywords(Filters)
    def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        """One page of the episodes that match the filters, by default the newest first."""
        return self.run(calls.list_episodes(filters))

    @keywords(EpisodeQuery)
    def episodes(self, **where: Unpack[EpisodeQuery]) -> Generator[EpisodeResource]:
        """Yields all episodes that match the filters, by default the newest first. Reads them page by page."""
        page = self.run(calls.list_episodes(Filters(**where)))
        while True:
            yield from page.episodes
            if page.next_cursor is None:
                return
            page = self.run(calls.list_episodes(Filters(**where, cursor=page.next_cursor)))

    @keywords(EpisodeFilter)
    def export(self, format: TrajectoryFormat = "steps", **where: Unpack[EpisodeFilter]) -> Generator[dict[str, Any]]:
        """Yields trajectories that match the filters, newest first. Without a `status` filter, of ended episodes only.

        Only one trajectory is in memory at a time. Raises ConnectionFailed if the export is incomplete.
        """
        return self.stream(calls.export(format, where), LineReader())

    @keywords(EvaluationQuery)
    def evaluation(self, **query: Unpack[EvaluationQuery]) -> Evaluation:
        """Summarizes the episodes that match the filters, in groups, with confidence intervals.

        `by` is what divides the episodes into groups. With a `baseline`, every other group is compared with it.
        """
        return self.run(calls.evaluation(query))

    def profiles(self) -> list[Profile]:
        """The profiles that `episode(profile=...)` accepts."""
        return self.run(calls.profiles())

    def policies(self) -> list[Policy]:
        """The base model, followed by the loaded adapters."""
        return self.run(calls.policies())

    def policy_versions(self) -> list[PolicyVersion]:
        """All stored versions of adapters."""
        return self.run(calls.policy_versions())

    def load_policy(
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
        """Loads a version of a LoRA adapter, and lets `name` point to it. Without `alias`, it is only loaded.

        Give either `path`, a folder on the service's machine, relative to EPISODIC_ADAPTERS, or `version`, a stored
        version (`name@digest`). `parent`, `round` and `evaluation` are stored with the version.
        """
        fields = {"path": path, "version": version, "alias": alias, "parent": parent, "round": round}
        return self.run(calls.load_policy(name, {**fields, "evaluation": evaluation}))

    def upload_policy(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        alias: bool = True,
        parent: str | None = None,
        round: int | None = None,
    ) -> PolicyVersion:
        """Like `load_policy`, with an adapter on this machine: the folder that PEFT's `save_pretrained` wrote.

        It is sent in one request, so it must fit into memory.
        """
        fields = {"alias": alias, "parent": parent, "round": round}
        return self.run(calls.upload_policy(name, Path(folder), fields))

    def roll_back_policy(self, name: str) -> PolicyVersion:
        """Lets `name` point to the version that it pointed to before."""
        return self.run(calls.roll_back_policy(name))

    def set_default_policy(self, policy: str | None) -> str:
        """Chooses the policy of new episodes that name none. None leaves it to the service's settings.

        Returns the name of the default policy.
        """
        return self.run(calls.set_default_policy(policy))

    def remove_policy(self, name: str) -> None:
        """Unloads an adapter."""
        self.run(calls.remove_policy(name))

    def wait_ready(self, timeout_s: float = 300.0) -> None:
        """Waits until the service is ready. Raises Unavailable or ConnectionFailed after `timeout_s` seconds."""
        self.run(calls.ready(PROBE_TIMEOUT_S), until_ready(timeout_s))

    def version(self) -> dict[str, Any]:
        """The versions of the service and of its policy."""
        return self.run(calls.version())

    def run(self, call: Call[T], retry: Retry | None = None) -> T:
        """Sends one call, with retries, and returns its result."""
        request = call.request(self._http)
        attempts = Attempts(retry or self._retry, repeatable=call.repeatable, link=self._link)
        while True:
            outcome = self._send(request)
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                return call.settle(outcome)
            time.sleep(wait_s)

    def stream(self, call: Call[Any], reader: Reader[T]) -> Generator[T]:
        """Sends one call and yields the values of its streamed response. Retries only until the first value."""
        attempts = Attempts(self._retry, repeatable=call.repeatable, link=self._link)
        while True:
            num_values = 0
            try:
                with closing(self._stream_once(call, reader, attempts)) as values:
                    for value in values:
                        num_values += 1
                        yield value
                return
            except ApiError as error:
                wait_s = None if num_values else attempts.wait_after_event_s(error.status)
                if wait_s is None:
                    raise
            time.sleep(wait_s)

    def _stream_once(self, call: Call[Any], reader: Reader[T], attempts: Attempts) -> Generator[T]:
        with closing(self._open_stream(call, attempts)) as response:
            try:
                for chunk in response.iter_bytes():
                    with reading(str(call)):
                        yield from reader.feed(chunk)
            except httpx.RequestError as error:
                raise ConnectionFailed(f"{call}: the connection failed while the response arrived: {error}") from error
        reader.end()

    def _open_stream(self, call: Call[Any], attempts: Attempts) -> httpx.Response:
        """Sends the call, with retries, until a successful response begins."""
        request = call.request(self._http)
        while True:
            outcome = self._send(request, stream=True)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            wait_s = attempts.wait_s(outcome)
            if wait_s is None:
                call.settle(outcome)
                raise AssertionError("settle raises if the call did not succeed")
            time.sleep(wait_s)

    def _send(self, request: httpx.Request, *, stream: bool = False) -> Outcome:
        """One attempt. With `stream`, the body is still unread if the response is a success."""
        try:
            response = self._http.send(request, stream=stream)
            if not response.is_success:
                response.read()
            return response
        except httpx.RequestError as error:
            return error

    def close(self) -> None:
        """Closes all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
