"""Owns the blocking client. `asynchronous` is the same for asyncio: the two differ in their I/O alone."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
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


class Episode(EpisodeState["Client"]):
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
        made = self._client.run(calls.fork(self.id, new_ids(n), at_step, group))
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
        timeout_s: float = TIMEOUT_S,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retry = retry or Retry()
        self._http = httpx.Client(transport=transport, **http_options(base_url, api_key, timeout_s))

    def episode(self, *, episode_id: str | None = None, **fields: Unpack[EpisodeFields]) -> Episode:
        """Begins an episode under an id made here, unless one is given."""
        return Episode(self, self.run(calls.create_episode(episode_id or str(uuid7()), fields)))

    def resume(self, episode_id: str) -> Episode:
        """Takes up an episode that exists, at its next step."""
        return Episode(self, self.run(calls.get_episode(episode_id)))

    def act_batch(self, acts: Sequence[BatchItem[Episode]]) -> list[Act | ApiError]:
        """Acts in distinct episodes at once: (episode, observation, further fields of an act) each. Answers in order;
        an act that failed is the error it met, and its episode stays where it was."""
        batch, attempts = Batch(acts), Attempts(self._retry)
        while True:
            batch.take(self.run(batch.call()))
            wait_s = attempts.backoff_s() if batch.due else None
            if wait_s is None:
                return batch.results
            time.sleep(wait_s)

    def list_episodes(self, **filters: Unpack[Filters]) -> EpisodePage:
        return self.run(calls.list_episodes(filters))

    def episodes(self, **where: Unpack[EpisodeFilter]) -> Generator[EpisodeResource]:
        """Every episode with these labels, newest first, page by page."""
        page = self.run(calls.list_episodes(Filters(**where)))
        while True:
            yield from page.episodes
            if page.next_cursor is None:
                return
            page = self.run(calls.list_episodes(Filters(**where, cursor=page.next_cursor)))

    def export(self, format: TrajectoryFormat = "steps", **where: Unpack[EpisodeFilter]) -> Generator[dict[str, Any]]:
        """Finished trajectories (or those of another status), newest first, one in memory at a time. An export that was
        cut off raises ConnectionFailed."""
        return self.stream(calls.export(format, where), LineReader())

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
        self.run(calls.ready(PROBE_TIMEOUT_S), until_ready(timeout_s))

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
                raise AssertionError("settle raises what is no success")
            time.sleep(wait_s)

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
