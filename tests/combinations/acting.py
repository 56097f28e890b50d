"""Sends acts to the replicas, and checks each answer, and what is stored, against the model."""

import asyncio
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from prometheus_client import REGISTRY

from service.api.http.problems import CODES
from tests.combinations.model import DISCRETE, TTL_S, Episode, Flight, Request
from tests.combinations.world import LIMIT_S, QUOTAS, Answer, Call, Replica, World, quiescence

STATUSES = {code: status for status, codes in CODES.items() for code in codes}
IDLE = Request("end", "", "", {"idle": True})
"""Stands for the idle timeout, which no caller can send."""


class Violation(AssertionError):
    """An answer, or what is stored, contradicts the model."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise Violation(message)


@dataclass
class Pending:
    """A call that waits at a gate. `expected` collects, for each request, what it may come to."""

    call: Call
    requests: Sequence[Request]
    expected: list[set[str]]
    has_left: bool = False
    expired: set[int] = field(default_factory=set[int])
    """The requests that nobody waits for any more."""


@dataclass(frozen=True)
class Outcome:
    """What a request came to, and its document: the answer, or the problem."""

    name: str
    document: Any


class Acting:
    """Sends the calls of one sequence that may commit a step.

    Its episodes have names of their own, so that sequences can share a world.
    """

    def __init__(self, world: World, counts: Counter[str]) -> None:
        self.world, self.counts = world, counts
        world.log.clear()
        world.num_sequences += 1
        self.prefix = f"s{world.num_sequences}"
        self.episodes: dict[tuple[str, str], Episode] = {}
        self.pending: list[Pending] = []
        self.sent: list[Request] = []
        self.observations = itertools.count()
        self._at_start = failures()

    # --- calls

    def call(
        self, replica: Replica, tenant: str, method: str, path: str, body: Any = None, query: Any = None, **headers: str
    ) -> Call:
        content = b"" if body is None else json.dumps(body).encode()
        key = self.world.keys[tenant][0]
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        text = f"{replica.number} {tenant} {method} {path} {urlencode(query or {})} {content.decode()} {named or ''}"
        call = Call(replica, method, path, key, content, named, urlencode(query or {})).start()
        self.world.log.append(text)
        return call

    async def answered(self, call: Call, kind: str) -> Answer:
        """Waits for the answer of a call that waits for nothing else."""
        check(await call.wait(), f"{call.method} {call.path} hangs")
        return self.count(call.answer, kind)

    def count(self, answer: Answer, kind: str) -> Answer:
        document = answer.document if answer.headers.get("content-type") == "application/problem+json" else None
        self.world.log.append(f"   {kind}: {answer.status} {document or answer.content[:300]!r}")
        self.counts[f"{kind} {answer.status}{' ' + document['code'] if document else ''}"] += 1
        if document:
            check(
                STATUSES.get(document["code"]) == answer.status == document["status"],
                f"status and code differ: {document}",
            )
            check(document["code"] != "internal_error", f"{kind}: {document}")
            check("retry-after" in answer.headers or answer.status not in (429, 503), f"no Retry-After: {document}")
        else:
            check(answer.status < 400, f"{kind} answered {answer.status} without a problem: {answer.content!r}")
        check(answer.headers.get("x-request-id"), "no X-Request-ID")
        return answer

    def allows(self, replica: Replica, tenant: str, num_calls: int = 1) -> bool:
        """Counts a call against the rate limit. Returns whether it is within the limit."""
        return self.world.buckets.allow(replica.number, tenant, self.world.clock.monotonic(), num_calls)

    async def plain(
        self,
        kind: str,
        replica: Replica,
        tenant: str,
        method: str,
        path: str,
        expected: set[str],
        body: Any = None,
        query: Any = None,
    ) -> Any:
        """Sends a call that never waits at a gate. `expected` has error codes, and `ok` if it may succeed.

        Returns the document of a success, else None.
        """
        if not self.allows(replica, tenant):
            expected = {"rate_limited"}
        answer = await self.answered(self.call(replica, tenant, method, path, body, query), kind)
        document = None if answer.headers.get("content-type") == "application/x-ndjson" else answer.document
        outcome = "ok" if answer.status < 400 else document["code"]
        check(outcome in expected, f"{kind}: {outcome}, expected {sorted(expected)}: {document}")
        if outcome != "ok":
            return None
        return (
            [json.loads(line) for line in answer.content.splitlines()]
            if document is None and answer.content
            else document or {}
        )

    # --- calls that may commit a step

    async def send(
        self,
        replica: Replica,
        requests: Sequence[Request],
        *,
        bad_items: Sequence[Any] = (),
        leaves_after: int | None = None,
    ) -> None:
        """Sends requests in one call, and settles it, unless it waits at a gate. More than one is a batch.

        leaves_after: number of turns of the event loop after which the caller disconnects.
        """
        first = requests[0]
        num_items = len(requests) + len(bad_items)
        expected = [self.expect(request, replica) for request in requests]
        refusals = self._refusals(replica, first, num_items)
        call = self._started(replica, requests, bad_items)
        self.sent += requests
        pending = Pending(call, requests, [names | refusals for names in expected])
        if "rate_limited" in refusals or "must" in refusals:
            pending.expected = [set(refusals) for _ in requests]
        if leaves_after is not None:
            for _ in range(leaves_after):
                await asyncio.sleep(0)
            pending.has_left = not call.done
            call.leave()
            self.world.log.append(f"   leaves after {leaves_after} turns")
        await self._at_rest(pending)
        if call.done:
            unknown = pending.has_left or any("store_unavailable" in names for names in pending.expected)
            await (self._reconciled([pending]) if unknown else self._settle(pending))
            return
        await self._wait_at_gate(pending, replica)

    async def _at_rest(self, pending: Pending) -> None:
        """Waits until the call is answered or waits for a gate."""
        await quiescence()
        replica = pending.call.replica
        if not pending.call.done and not self._may_wait(pending, replica):
            check(await pending.call.wait(), f"{pending.call.path} hangs")

    def _may_wait(self, pending: Pending, replica: Replica) -> bool:
        return replica.gate is not None or any(self._flights(request) for request in pending.requests)

    def _flights(self, request: Request) -> dict[int, Flight]:
        episode = self.episodes.get((request.tenant, request.name))
        return episode.flights if episode else {}

    async def _wait_at_gate(self, pending: Pending, replica: Replica) -> None:
        for request, expected in zip(pending.requests, pending.expected, strict=True):
            episode = self.episodes.get((request.tenant, request.name))
            waits = {"act", "close", "replay", *(["policy_failed"] if replica.gate == "engine" else [])}
            if episode is None or not expected & waits:
                continue
            if len(pending.requests) > 1 and await self._is_stored_already(episode, pending):
                continue
            if flight := episode.flights.get(replica.number):
                flight.num_waiting += 1
            else:
                index = self._index_at(episode, request)
                is_certain = len(pending.requests) == 1 or not episode.small
                episode.flights[replica.number] = Flight(request, index, 1, replica.gate == "commits", is_certain)
        self.pending.append(pending)
        if any(request.timeout_s for request in pending.requests):
            await self._until_timeout(pending)

    def _index_at(self, episode: Episode, request: Request) -> int:
        """The index of the step that a waiting act would take. A stale replica may decide a stored step again."""
        named = (index for index in (request.step, episode.index_of(request.key)) if index is not None)
        return min([episode.num_steps, *named])

    async def _is_stored_already(self, episode: Episode, batch: Pending) -> bool:
        """Whether the episode's act in the batch was stored, because it needs no engine, while the batch waits for
        others of its acts."""
        before = episode.num_steps, episode.stop_reason
        await self._explain(episode, self._on(episode, [batch, *self.pending]))
        return (episode.num_steps, episode.stop_reason) != before

    async def _until_timeout(self, pending: Pending) -> None:
        """Waits until the timeout of the act expires, unless its commit has begun: that one is awaited."""
        if not await pending.call.wait(0.3):
            # A batch still waits for others of its acts.
            self._left(pending, [n for n, request in enumerate(pending.requests) if (request.timeout_s or 1) < 1])
            return
        self.pending.remove(pending)
        self._left(pending)
        pending.expected = [names | {"deadline_exceeded"} for names in pending.expected]
        await self._reconciled([pending])

    def _left(self, pending: Pending, numbers: Sequence[int] | None = None) -> None:
        """A caller has left, or stopped to wait for some requests: an act that nobody waits for any more is aborted,
        unless its commit has begun."""
        number = pending.call.replica.number
        leaving = set(range(len(pending.requests)) if numbers is None else numbers) - pending.expired
        pending.expired |= leaving
        for request in (pending.requests[place] for place in sorted(leaving)):
            if flight := self._flights(request).get(number):
                flight.num_waiting -= 1
                if not flight.num_waiting and not flight.is_committing:
                    del self._flights(request)[number]

    def can_leave(self) -> list[Pending]:
        """Returns the calls whose callers may disconnect. An end goes on without its caller."""
        return [pending for pending in self.pending if not pending.has_left and pending.requests[0].kind != "end"]

    async def leave(self, pending: Pending) -> None:
        """Breaks off a call that waits at a gate."""
        self.world.log.append(f"   leaves {pending.call.path}")
        pending.call.leave()
        check(await pending.call.wait(), "a call goes on after its caller has left")
        pending.has_left = True
        self._left(pending)
        if not any(self._flights(request).get(pending.call.replica.number) for request in pending.requests):
            self.pending.remove(pending)
            await self._reconciled([pending])

    def _started(self, replica: Replica, requests: Sequence[Request], bad_items: Sequence[Any]) -> Call:
        first = requests[0]
        if first.kind == "item":
            items = [*(_document(request) for request in requests), *bad_items]
            return self.call(replica, first.tenant, "POST", "/act/batch", {"acts": items})
        if first.kind in ("record", "end"):
            path = f"/episode/{first.name}/{'action' if first.kind == 'record' else 'end'}"
            document = _document(first)
            del document["episode_id"]
        else:
            path, document = "/act", _document(first)
        headers = {"idempotency_key": first.key} if first.key else {}
        if first.kind == "stream":
            headers["accept"] = "text/event-stream"
        return self.call(replica, first.tenant, "POST", path, document, **headers)

    def expect(self, request: Request, replica: Replica) -> set[str]:
        episode = self.episodes.get((request.tenant, request.name))
        if episode is None:
            return {"invalid_request"} if request.fault == "form" else {"episode_not_found"}
        expected = set(episode.expect(request, replica.number))
        if request.kind in ("act", "stream", "item"):
            # A replica that does not know the latest step may ask its engine although the request is a retry.
            impossible = set[str]() if _is_forced(episode, request) else {"act"}
            if not replica.may_load.is_set():
                expected = expected - impossible | {"engine_unavailable"}
            elif replica.engine.has_nan and impossible:
                expected = expected - impossible | {"policy_failed"}
        if request.timeout_s is not None:
            expected |= {"deadline_exceeded"} if request.timeout_s < 1 else set()
        if replica.fault:  # a replica may also try to commit because it does not know the latest step
            expected |= {"store_unavailable"} if replica.fault != "stored" else set()
        return expected

    def _refusals(self, replica: Replica, first: Request, num_items: int) -> set[str]:
        """Returns the codes with which the whole call may be refused; with `must` if it has to be."""
        if not self.allows(replica, first.tenant, num_items if first.kind == "item" else 1):
            return {"rate_limited"}
        if first.kind == "end":
            return set()
        waiting = [
            p for p in self.pending if p.call.replica is replica and not p.has_left and p.requests[0].kind != "end"
        ]
        own = sum(p.requests[0].tenant == first.tenant for p in waiting)  # of a batch, one act or more
        refusals: set[str] = set()
        if (limit := QUOTAS[first.tenant].concurrent_acts) and own:
            refusals |= {"quota_exceeded", *(["must"] if own >= limit else [])}
        if sum(len(p.requests) for p in waiting) >= 2:
            refusals |= {"overloaded"}
        return refusals

    # --- answers

    def _outcomes(self, pending: Pending) -> list[Outcome]:
        """Returns what each request of the call came to. Empty if it has no answer yet, or its caller left before."""
        if pending.has_left or not pending.call.done:
            return []
        first = pending.requests[0]
        answer = self.count(pending.call.answer, "batch" if first.kind == "item" else first.kind)
        if answer.headers.get("content-type") == "application/problem+json":
            return [Outcome(answer.document["code"], answer.document)] * len(pending.requests)
        if first.kind == "item":
            results = answer.document["results"][: len(pending.requests)]
            for problem in answer.document["results"][len(pending.requests) :]:
                check(problem.get("code") in ("invalid_request", "malformed_json"), f"a bad item got {problem}")
            return [_outcome(result) for result in results]
        if first.kind == "stream":
            return [_outcome(_last_event(answer))]
        if first.kind == "end":
            return [Outcome("close", answer.document)]
        return [_outcome(answer.document)]

    async def _settle(self, pending: Pending) -> None:
        """Checks the answer of a call during which nothing else happened to its episodes, and adds it to the model."""
        for request, expected, outcome in zip(pending.requests, pending.expected, self._outcomes(pending), strict=True):
            self.counts[f"{request.kind}: {outcome.name}"] += 1
            self._check_expected(request, expected, outcome)
            episode = self.episodes.get((request.tenant, request.name))
            if episode is None:
                continue
            before = episode.num_steps, episode.stop_reason
            if request.kind == "end":
                if outcome.name == "close" and episode.is_active:
                    episode.close(request, request.stop_reason or "aborted", {})
                if outcome.name == "close":
                    self._check_resource(episode, outcome.document)
            elif outcome.name == "act":
                episode.take(request, outcome.document)
                self._check_act(episode, episode.num_steps - 1, outcome.document)
            elif outcome.name == "close":
                episode.close(request, _stop_reason(episode, request), outcome.document)
                check(outcome.document["step"] == episode.num_steps, f"the closing step is {outcome.document}")
            elif outcome.name == "replay":
                self._check_replay(episode, outcome.document)
            else:
                self._check_refusal(episode, outcome)
            if (episode.num_steps, episode.stop_reason) != before:
                self._overtake_streams(episode)

    def _overtake_streams(self, episode: Episode) -> None:
        for pending, number in self._on(episode, self.pending):
            pending.expected[number] |= _overtaken(pending.requests[number], episode)

    def _check_expected(self, request: Request, expected: set[str], outcome: Outcome) -> None:
        name = "replay" if outcome.name == "close" and outcome.document.get("replayed") else outcome.name
        names = expected | ({"close"} if "unchanged" in expected else set())
        check(name in names, f"{request} came to {outcome}, expected {sorted(expected)}")

    def _check_refusal(self, episode: Episode, outcome: Outcome) -> None:
        problem = outcome.document
        if outcome.name == "step_conflict":
            check(problem["expected_step"] == episode.num_steps, f"{problem}, but there are {episode.num_steps} steps")
        if outcome.name == "episode_ended":
            check(problem["stop_reason"] == episode.stop_reason, f"{problem}, but it is {episode.stop_reason}")

    def _check_act(self, episode: Episode, index: int, answer: dict[str, Any]) -> None:
        check(answer["step"] == index, f"step {answer['step']} was answered, but the next one is {index}")
        check(answer["episode_id"] == episode.name, f"another episode's answer: {answer}")
        request = episode.steps[index].request
        if "action" in request.body:
            check(answer["action"] == request.body["action"], f"another action was recorded: {answer}")
            return
        check(
            (answer["action"] is None) == (answer["parse_failure"] is not None), f"no action and no failure: {answer}"
        )
        if episode.space == "discrete":
            legal = request.body.get("legal_actions") or DISCRETE
            check(answer["action"] in legal, f"illegal: {answer}")
            check(math.isclose(sum(answer["action_probs"].values()), 1.0, abs_tol=1e-6), f"probabilities: {answer}")
        elif answer["action"] is not None and episode.space in ("json", "tools"):
            check(json.loads(answer["text"]) == answer["action"], f"text and action differ: {answer}")

    def _check_replay(self, episode: Episode, answer: dict[str, Any]) -> None:
        stored = episode.at(answer["step"])
        check(stored, f"a replay of a step that is not stored: {answer}")
        assert stored is not None
        changing = {"replayed": 0, "timing": 0, "episode_id": 0}
        if stored.answer:  # not the answer of an end
            check({**stored.answer, **changing} == {**answer, **changing}, f"{answer} differs from {stored.answer}")
        check(answer["episode_id"] == episode.name, f"another episode's answer: {answer}")

    # --- what is stored

    async def release(self, *, code: str | None = None, at: Replica | None = None) -> None:
        """Opens all gates, and checks the answers of all calls that waited. Those at `at` may fail with `code`."""
        for pending in self.pending:
            for names in pending.expected if pending.call.replica.engine.has_nan else ():
                names.update(["policy_failed"] if "act" in names else [])
        for replica in self.world.replicas:
            replica.open_gate()
        await quiescence()
        waiting, self.pending = self.pending, []
        for pending in waiting:
            check(await pending.call.wait(), f"{pending.call.path} hangs")
            if code and pending.call.replica is at:
                pending.expected = [names | {code} for names in pending.expected]
        await self._reconciled(waiting)
        for episode in self.episodes.values():
            if episode.may_expire and episode.is_active:
                await self._until_expired(episode)

    async def _until_expired(self, episode: Episode) -> None:
        """Waits until the episode has ended, unless an act is in flight. Then it may end, or not."""
        async with asyncio.timeout(LIMIT_S):
            await self._explain(episode, self._on(episode, self.pending))
            while episode.is_active and episode.may_expire and not episode.flights:
                await asyncio.sleep(0.05)
                await self._explain(episode, [])

    async def _reconciled(self, settled: Sequence[Pending]) -> None:
        """Finds out which of the requests were stored, and checks their answers. They may have raced, also with calls
        that still wait: an act of a batch may be stored while the batch waits for another one."""
        await quiescence()
        for episode in self.episodes.values():
            if not self.pending:
                episode.flights.clear()
            mine = self._on(episode, settled)
            if mine or episode.may_expire:
                await self._explain(episode, mine + self._on(episode, self.pending))
        for pending in settled:
            for number, outcome in enumerate(self._outcomes(pending)):
                request = pending.requests[number]
                self.counts[f"{request.kind}: {outcome.name}"] += 1
                episode = self.episodes.get((request.tenant, request.name))
                self._check_expected(request, pending.expected[number], outcome)
                if episode and outcome.name in ("act", "close", "replay") and request.kind != "end":
                    self._check_replay(episode, outcome.document)
        self._check_once(settled)

    def _on(self, episode: Episode, calls: Sequence[Pending]) -> list[tuple[Pending, int]]:
        """Returns the requests of these calls that are about the episode."""
        name = (episode.tenant, episode.name)
        return [(p, n) for p in calls for n, request in enumerate(p.requests) if (request.tenant, request.name) == name]

    def _check_once(self, settled: Sequence[Pending]) -> None:
        """Checks that no two calls received the same step as a new one."""
        fresh = Counter(
            (request.tenant, request.name, outcome.document["step"])
            for pending in settled
            for request, outcome in zip(pending.requests, self._outcomes(pending), strict=False)
            if request.kind != "end" and outcome.name in ("act", "close") and not outcome.document["replayed"]
        )
        check(max(fresh.values(), default=0) < 2, f"a step was answered as new twice: {fresh}")

    async def _explain(self, episode: Episode, calls: Sequence[tuple[Pending, int]]) -> None:
        """Adds the stored steps that the model does not have: each must come from one of the calls."""
        document = await self.trajectory(episode)
        self._expect_more(episode, calls)
        if document is None:
            return
        for row in document["steps"][episode.num_steps :]:
            request, answer = self._origin(episode, calls, row)
            episode.take(request, answer)
            self._expect_more(episode, calls)
        if document["closing"] and not episode.closing:
            if document["episode"]["stop_reason"] == "idle_ttl":
                check(episode.may_expire, f"{episode.name} expired")
                episode.close(IDLE, "idle_ttl", {})
            else:
                request, answer = self._origin(episode, calls, document["closing"])
                episode.close(request, _stop_reason(episode, request), answer)
            self._expect_more(episode, calls)
        if document["episode"]["updated_at"] + TTL_S > self.world.clock.now():
            episode.may_expire = False  # of two acts that were in flight, the later one was committed
        self._compare(episode, document)

    def _expect_more(self, episode: Episode, calls: Sequence[tuple[Pending, int]]) -> None:
        """After another call has changed the episode, a call may come to what it would come to now."""
        for pending, number in calls:
            request = pending.requests[number]
            pending.expected[number] |= replace(episode, flights={}).expect(request, -1)
            if len(calls) > 1:  # an act that lost a race is decided once more, and meets what arrived meanwhile
                pending.expected[number] |= {"step_conflict", "episode_busy"} | _overtaken(request, episode)

    def _origin(
        self, episode: Episode, calls: Sequence[tuple[Pending, int]], row: dict[str, Any]
    ) -> tuple[Request, dict[str, Any]]:
        """Returns the request that a stored row comes from, and its answer as far as it is known."""
        found = [(p, n) for p, n in calls if _is_of(row, p.requests[n])]
        check(found, f"{episode.name} has a step that nobody sent, or twice: {row}")
        for pending, number in found:
            outcomes = self._outcomes(pending)
            if outcomes and outcomes[number].name in ("act", "close") and pending.requests[number].kind != "end":
                answer = outcomes[number].document
                if answer["step"] == row["step"] and not answer["replayed"]:
                    return pending.requests[number], answer
        pending, number = found[0]
        return pending.requests[number], {}

    async def trajectory(self, episode: Episode, replica: Replica | None = None) -> Any:
        """Reads what is stored; None if the episode was deleted."""
        if QUOTAS[episode.tenant].calls_per_s:
            self.world.clock.advance(1)
        expected = {"episode_deleted"} if episode.deleted else {"ok"}
        path = f"/episode/{episode.name}/trajectory"
        return await self.plain("trajectory", replica or self.world.replicas[0], episode.tenant, "GET", path, expected)

    async def verify(self, episode: Episode, replica: Replica) -> None:
        document = await self.trajectory(episode, replica)
        if document is not None:
            self._compare(episode, document)

    def _compare(self, episode: Episode, document: dict[str, Any]) -> None:
        self._check_resource(episode, document["episode"])
        rows, closing = document["steps"], document["closing"]
        check(len(rows) == episode.num_steps, f"{episode.name}: {len(rows)} steps, expected {episode.num_steps}")
        check(bool(closing) == bool(episode.closing), f"{episode.name}: closing {closing}, expected {episode.closing}")
        for row, taken in zip(rows, episode.steps, strict=True):
            check(row["observation"] == _observation(taken.request), f"{row} is not {taken}")
            if taken.answer:
                check(row["action"] == taken.answer["action"], f"{row} is not {taken}")
        rewards = [
            taken.request.body.get("reward")
            for taken in [*episode.steps, *([episode.closing] if episode.closing else [])]
        ]
        for row, reward in zip(rows, [*rewards[1:], None], strict=False):
            check(row["reward"] == reward, f"the reward of {row} is not {reward}")
        ratings = [(item["step"], item["rater"], item["rating"]) for item in document["feedback"]]
        check(Counter(ratings) == Counter(episode.ratings), f"{ratings} are not {episode.ratings}")

    def _check_resource(self, episode: Episode, found: dict[str, Any]) -> None:
        expected = {
            "episode_id": episode.name,
            "status": "active" if episode.is_active else "ended",
            "stop_reason": episode.stop_reason,
            "step": episode.num_steps,
            "success": episode.closing.request.body.get("success") if episode.closing else None,
            "group": episode.body.get("group"),
            "parent": episode.parent and {"episode_id": episode.parent[0], "step": episode.parent[1]},
        }
        different = {name: (found[name], value) for name, value in expected.items() if found[name] != value}
        check(not different, f"{episode.name}: found and expected differ: {different}")
        check(
            math.isclose(found["episode_return"], episode.episode_return),
            f"{found['episode_return']} is not {episode.episode_return}",
        )


def failures() -> float | None:
    return REGISTRY.get_sample_value("agent_unexpected_failures_total")


def _stop_reason(episode: Episode, request: Request) -> str:
    if request.stop_reason:
        return request.stop_reason
    return "max_steps" if episode.num_steps >= episode.body.get("max_steps", math.inf) else "context_overflow"


def _document(request: Request) -> dict[str, Any]:
    named = {"step": request.step, "timeout_s": request.timeout_s}
    return {
        "episode_id": request.name,
        **request.body,
        **{name: value for name, value in named.items() if value is not None},
    }


def _outcome(document: dict[str, Any]) -> Outcome:
    if "code" in document:
        return Outcome(document["code"], document)
    return Outcome("replay" if document["replayed"] else "close" if document["done"] else "act", document)


def _last_event(answer: Answer) -> dict[str, Any]:
    """Returns the document of a stream's last event. The deltas before it must be its text."""
    events = [event for event in answer.content.decode().split("\n\n") if event and not event.startswith(":")]
    parsed = [dict(line.split(": ", 1) for line in event.split("\n") if not line.startswith(":")) for event in events]
    check(parsed and parsed[-1]["event"] in ("act", "error"), f"a stream ends with {parsed[-1:]}")
    last = json.loads(parsed[-1]["data"])
    if parsed[-1]["event"] == "act":
        text = "".join(json.loads(event["data"])["delta"] for event in parsed if event["event"] == "text")
        check(text == (last["text"] or ""), f"the deltas are {text!r}, and the text is {last['text']!r}")
    return last


def _observation(request: Request) -> Any:
    return request.body.get("observation")


def _overtaken(request: Request, episode: Episode) -> set[str]:
    """What a stream may come to if another replica has changed the episode meanwhile. It has sent text, so it cannot
    become a replay."""
    if request.kind != "stream":
        return set()
    return {"step_conflict"} if episode.is_active else {"step_conflict", "episode_ended"}


def _is_of(row: dict[str, Any], request: Request) -> bool:
    """Whether a row of a trajectory may come from the request: they have the same observation and info, and a row that
    ends the episode has the same other fields."""
    body = request.body
    ends = ("reward", "terminated", "truncated", "success") if "terminated" in row else ()
    return all((row[name] or None) == (body.get(name) or None) for name in ("observation", "info", *ends))


def _is_forced(episode: Episode, request: Request) -> bool:
    """Whether there is only one legal action and no thought: then the engine is not asked."""
    return len(request.body.get("legal_actions") or ()) == 1 and not episode.body.get("reasoning")
