"""A small model of what the service promises: the state of each episode, and what a call may answer in this state."""

import json
import math
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tests.combinations.world import NUM_REPLICAS, QUOTAS

DISCRETE = ("left", "right", "left turn", "go to the kitchen")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
SPACES: dict[str, Any] = {
    "text": {"type": "text"},
    "discrete": {"type": "discrete", "actions": list(DISCRETE)},
    "json": {"type": "json", "schema": SCHEMA},
    "regex": {"type": "regex", "pattern": "n[0-9]+"},
    "tools": {"type": "tools", "tools": [{"name": "go", "parameters": SCHEMA}]},
}
TTL_S = 300.0
_NOT_DIGESTED = ("episode_id", "step", "timeout_s")

Kind = Literal["act", "stream", "item", "record", "end"]
Expected = frozenset[str]
"""What a call may come to: an error code, or one of
act: a new step with an action; close: the step that ends the episode; replay: the answer to an earlier request;
unchanged: the episode as it was.
"""


def digest(body: dict[str, Any]) -> str:
    """Identifies a body, as retries do: without the fields in which a retry may differ."""
    return json.dumps({name: value for name, value in body.items() if name not in _NOT_DIGESTED}, sort_keys=True)


@dataclass(frozen=True)
class Request:
    """A call that may commit a step. `fault` says where its body is invalid: its form, its content, or its action."""

    kind: Kind
    tenant: str
    name: str
    body: dict[str, Any]
    """Without `episode_id`, `step` and `timeout_s`."""
    step: int | None = None
    key: str | None = None
    timeout_s: float | None = None
    fault: Literal["form", "content", "action"] | None = None

    @property
    def digest(self) -> str:
        return digest(self.body)

    @property
    def stop_reason(self) -> str | None:
        """Why the episode ends with this request; None if it asks for an action."""
        if self.body.get("terminated") or self.body.get("truncated"):
            return "terminated" if self.body.get("terminated") else "truncated"
        return "aborted" if self.kind == "end" else None


@dataclass(frozen=True)
class Taken:
    """A stored step. `own` is false for the steps that a fork shares with its parent."""

    request: Request
    answer: dict[str, Any]
    closing: bool = False
    own: bool = True

    @property
    def reward(self) -> float:
        return self.request.body.get("reward") or 0.0


@dataclass
class Flight:
    """An act that waits at a gate of one replica: the first request, and how many callers wait for its answer."""

    request: Request
    index: int
    num_waiting: int = 1
    is_committing: bool = False
    is_certain: bool = True
    """Whether the act is in flight: an act of a batch that waits for others may have been refused already."""


@dataclass
class Episode:
    """An episode, as it must be in the store."""

    tenant: str
    name: str
    body: dict[str, Any]
    digest: str
    steps: list[Taken] = field(default_factory=list)
    closing: Taken | None = None
    stop_reason: str | None = None
    deleted: bool = False
    parent: tuple[str, int] | None = None
    ratings: list[tuple[Any, ...]] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)
    opened_with: dict[str, Any] = field(default_factory=dict)
    may_expire: bool = False
    """Whether its idle timeout ran out while an act was in flight."""
    is_late: bool = False
    """Whether it ran out during a commit, which does not restart it."""

    @property
    def space(self) -> str:
        return self.body.get("action_space", SPACES["text"])["type"]

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def is_active(self) -> bool:
        return self.stop_reason is None and not self.deleted

    @property
    def episode_return(self) -> float:
        return math.fsum(taken.reward for taken in [*self.steps, *([self.closing] if self.closing else [])])

    @property
    def small(self) -> bool:
        return "context" in self.body

    def is_stale_at(self, replica: int) -> bool:
        """Whether a call at the replica races: with an end of the episode, or because an act that is in flight there
        does not know what others have done since."""
        flight = self.flights.get(replica)
        if flight is None:
            return False
        if flight.request.stop_reason is not None or not flight.is_certain:
            return True
        return flight.index < self.num_steps or not self.is_active

    def at(self, index: int) -> Taken | None:
        return self.steps[index] if index < self.num_steps else self.closing if index == self.num_steps else None

    def index_of(self, key: str | None) -> int | None:
        rows = [*self.steps, *([self.closing] if self.closing else [])]
        return next((n for n, row in enumerate(rows) if key and row.own and row.request.key == key), None)

    def expect(self, request: Request, replica: int) -> Expected:
        """Returns what the request may come to now."""
        if request.fault == "form":
            return frozenset({"invalid_request"})
        flight = self.flights.get(replica)
        if flight and self.is_stale_at(replica):
            alone = replace(self, flights={}).expect(request, replica)
            return alone | self._in_flight(flight, request) | {"episode_busy", "idempotency_mismatch", "replay"}
        if self.deleted:
            return frozenset({"episode_deleted"})
        if request.fault == "action":  # refused before anything else, or where a valid action would be decided
            return self.expect(replace(request, fault="content"), replica) | {"invalid_request"}
        if request.kind == "end":
            return self._expect_end(request, flight)
        return self._retry(request) or (self._in_flight(flight, request) if flight else self._fresh(request))

    def _retry(self, request: Request) -> Expected:
        """Returns what a request comes to that repeats a stored step; nothing if it does not."""
        index, keyed = request.step, self.index_of(request.key)
        if keyed is not None:
            if request.step not in (None, keyed):  # a replica may not know the key yet, only the step
                named = self.at(request.step or 0)
                is_same = named is not None and named.request.digest == request.digest
                return frozenset({"idempotency_mismatch", *(["replay"] if is_same else [])})
            index = keyed
        taken = None if index is None else self.at(index)
        if taken is None:
            return frozenset()
        if taken.request.digest == request.digest:
            return frozenset({"replay"})
        return frozenset() if taken.closing and keyed is None else frozenset({"idempotency_mismatch"})

    def _in_flight(self, flight: Flight, request: Request) -> Expected:
        if request.kind == "end":
            return frozenset({"close", "unchanged"} if request.digest == flight.request.digest else {"episode_busy"})
        same_step = request.step is not None and request.step == flight.index
        same_key = request.key is not None and request.key == flight.request.key
        if not same_step and not same_key:
            return frozenset({"episode_busy"})
        if same_key and request.step not in (None, flight.index):
            return frozenset({"idempotency_mismatch"})
        if request.digest != flight.request.digest:
            named = same_key or flight.request.step is not None
            return frozenset({"idempotency_mismatch" if named else "episode_busy"})
        return frozenset({"replay"})

    def _expect_end(self, request: Request, flight: Flight | None) -> Expected:
        if flight:
            return self._in_flight(flight, request)
        if self.stop_reason:
            return frozenset({"unchanged"})
        return frozenset({"invalid_request"} if self._is_too_large(request) else {"close"})

    def _fresh(self, request: Request) -> Expected:
        if self.stop_reason:  # a replica that does not know yet that the episode has ended finds the same request
            is_same = self.closing is not None and self.closing.request.digest == request.digest
            return frozenset({"episode_ended", *(["replay"] if is_same else [])})
        if request.step not in (None, self.num_steps):
            return frozenset({"step_conflict"})
        if request.fault or self._is_too_large(request):
            return frozenset({"invalid_request"})
        if request.stop_reason or self.num_steps >= self.body.get("max_steps", math.inf):
            return frozenset({"close"})
        overflow = {"end": "close", "error": "context_overflow"}
        return frozenset({"act", *([overflow[self.body["context"]["overflow"]]] if self.small else [])})

    def _is_too_large(self, request: Request) -> bool:
        return not math.isfinite(self.episode_return + (request.body.get("reward") or 0.0))

    def needs_engine(self, request: Request) -> bool:
        """Whether the request asks the engine for an action now."""
        return request.kind in ("act", "stream", "item") and "act" in self.expect(request, -1)

    def take(self, request: Request, answer: dict[str, Any]) -> None:
        """Adds a step with an action."""
        self.steps.append(Taken(request, answer))
        self.may_expire = self.is_late

    def close(self, request: Request, stop_reason: str, answer: dict[str, Any]) -> None:
        """Adds the step that ends the episode."""
        self.closing, self.stop_reason = Taken(request, answer, closing=True), stop_reason

    def fork(self, name: str, at_step: int, group: str | None, digest: str) -> "Episode":
        steps = [replace(taken, own=False) for taken in self.steps[:at_step]]
        body = {**self.body, "group": group or self.body.get("group") or self.name}
        return Episode(self.tenant, name, deepcopy(body), digest, steps, parent=(self.name, at_step))

    def delete(self) -> None:
        self.deleted, self.ratings = True, []


class Bucket:
    """The rate limit of a tenant at one replica."""

    def __init__(self, rate: float) -> None:
        self.rate, self.allowance, self.counted_at = rate, max(rate, 1.0), 0.0

    def allows(self, now: float, num_calls: int) -> bool:
        """Counts the calls of one request, and returns whether it is admitted."""
        self.allowance = min(self.allowance + (now - self.counted_at) * self.rate, max(self.rate, 1.0))
        self.counted_at = now
        if self.allowance < 1.0:
            return False
        self.allowance -= num_calls
        return True


class Buckets:
    """The rate limits at all replicas."""

    def __init__(self) -> None:
        self._buckets = {
            (replica, tenant): Bucket(quota.calls_per_s)
            for replica in range(NUM_REPLICAS)
            for tenant, quota in QUOTAS.items()
            if quota.calls_per_s
        }

    def allow(self, replica: int, tenant: str, now: float, num_calls: int = 1) -> bool:
        bucket = self._buckets.get((replica, tenant))
        return bucket is None or bucket.allows(now, num_calls)

    def reset(self, replica: int) -> None:
        """A replica forgets the rates when it restarts."""
        for at, tenant in list(self._buckets):
            if at == replica:
                self._buckets[at, tenant] = Bucket(self._buckets[at, tenant].rate)
