"""Plays one sequence: opens, forks, reads and deletes episodes, injects faults, and checks the end."""

import asyncio
from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any

from prometheus_client import REGISTRY

from tests.combinations.acting import Acting, Pending, check, failures
from tests.combinations.model import SPACES, TTL_S, Episode, Request, digest
from tests.combinations.world import QUOTAS, Replica, quiescence, tasks

TOKEN_LISTS = ("token_ids", "loss_mask", "logprobs", "support", "recorded_mask")


class Player(Acting):
    """Plays one sequence of calls and faults."""

    # --- around an episode

    async def open(self, replica: Replica, tenant: str, name: str, body: dict[str, Any]) -> None:
        known = self.episodes.get((tenant, name))
        valid = body["action_space"] in SPACES.values()
        if known and not known.deleted and known.digest == digest(body):
            expected = {"ok"}
        elif not valid:
            expected = {"invalid_request"}
        elif known:
            expected = {"episode_deleted" if known.deleted else "idempotency_mismatch"}
        else:
            expected = {"ok"}
        if self._exceeds_quota(tenant, 1) and valid and not (known and expected == {"ok"}):
            expected = {"quota_exceeded"}
        document = await self.plain("open", replica, tenant, "POST", "/episode", expected, {"episode_id": name, **body})
        if document is None:
            return
        if known is None:
            self.episodes[tenant, name] = Episode(tenant, name, deepcopy(body), digest(body), opened_with=body)
        episode = self.episodes[tenant, name]
        if self.is_settled(episode):
            self._check_resource(episode, document)

    def _exceeds_quota(self, tenant: str, num_new: int) -> bool:
        limit = QUOTAS[tenant].active_episodes
        active = sum(episode.is_active for episode in self.episodes.values() if episode.tenant == tenant)
        return limit is not None and active + num_new > limit

    async def fork(self, replica: Replica, parent: Episode, body: dict[str, Any], names: Sequence[str] | None) -> None:
        given = {**body, **({"episode_ids": list(names)} if names else {})}
        identity = f"{parent.name} {digest(given)}"
        known = [self.episodes.get((parent.tenant, name)) for name in names or ()]
        is_retry = bool(known) and all(fork and not fork.deleted and fork.digest == identity for fork in known)
        if not self.is_settled(parent):
            return
        at_step = body.get("at_step", parent.num_steps)
        if is_retry:
            expected = {"ok"}
        elif parent.deleted:
            expected = {"episode_deleted"}
        elif at_step > parent.num_steps:
            expected = {"invalid_request"}
        elif self._exceeds_quota(parent.tenant, body["n"]):
            expected = {"quota_exceeded"}
        else:
            expected = {"idempotency_mismatch"} if any(known) else {"ok"}
            expected |= {"episode_deleted"} if any(fork and fork.deleted for fork in known) else set()
        document = await self.plain(
            "fork", replica, parent.tenant, "POST", f"/episode/{parent.name}/fork", expected, given
        )
        if document is None:
            return
        check(len(document["episodes"]) == body["n"], f"{document} are not {body['n']} forks")
        for found in document["episodes"]:
            if not is_retry:
                fork = parent.fork(found["episode_id"], at_step, body.get("group"), identity)
                self.episodes[parent.tenant, fork.name] = fork
            fork = self.episodes[parent.tenant, found["episode_id"]]
            if self.is_settled(fork):
                self._check_resource(fork, found)

    async def delete(self, replica: Replica, episode: Episode) -> None:
        flight = episode.flights.get(replica.number)
        expected = {"episode_deleted"} if episode.deleted else {"ok"}
        if flight:
            expected = expected | {"episode_busy"} if episode.is_stale_at(replica.number) else {"episode_busy"}
        document = await self.plain("delete", replica, episode.tenant, "DELETE", f"/episode/{episode.name}", expected)
        if document is not None:
            episode.delete()

    async def rate(self, replica: Replica, episode: Episode, body: dict[str, Any]) -> None:
        if not self.is_settled(episode):
            return
        step, rater = body.get("step"), body.get("rater")
        if body["rating"] < 1:
            expected = {"invalid_request"}
        elif episode.deleted:
            expected = {"episode_deleted"}
        else:
            expected = {"ok"} if step is None or step < episode.num_steps else {"invalid_request"}
        document = await self.plain(
            "feedback", replica, episode.tenant, "POST", f"/episode/{episode.name}/feedback", expected, body
        )
        if document is not None:
            if rater is not None:
                episode.ratings = [rating for rating in episode.ratings if rating[:2] != (step, rater)]
            episode.ratings.append((step, rater, body["rating"]))

    async def send_twice(self, replica: Replica, requests: Sequence[Request]) -> None:
        """Sends a batch with two acts of one episode, which is refused as a whole."""
        doubled = [*requests, requests[0]]
        refusals = self._refusals(replica, requests[0], 1)
        call = self._started(replica, doubled, ())
        pending = Pending(call, doubled, [refusals | {"invalid_request"} for _ in doubled])
        check(await call.wait(), "a batch that is refused hangs")
        for request, expected, outcome in zip(doubled, pending.expected, self._outcomes(pending), strict=True):
            self._check_expected(request, expected, outcome)

    # --- reads

    def is_settled(self, episode: Episode) -> bool:
        """Whether the model knows what is stored of the episode."""
        return not episode.flights and not (episode.may_expire and episode.is_active)

    async def read(self, replica: Replica, episode: Episode, choices: Random) -> None:
        """Reads something, chosen at random, and checks it."""
        what = choices.choice(("trajectory", "tokens", "messages", "list", "export", "other tenant"))
        if what == "other tenant":
            await self.read_other(replica, episode, choices.choice(list(QUOTAS)))
        elif what == "list":
            await self.read_list(replica, episode.tenant, choices.randint(1, 3))
        elif what == "export":
            await self.read_export(replica, episode.tenant)
        elif self.is_settled(episode):
            read = {"trajectory": self.verify, "tokens": self.read_tokens, "messages": self.read_messages}[what]
            await read(episode, replica)

    async def read_tokens(self, episode: Episode, replica: Replica) -> None:
        document = await self._read(replica, episode, "tokens")
        for segment in document["segments"] if document else ():
            lengths = {len(segment[name]) for name in TOKEN_LISTS}
            check(len(lengths) == 1, f"lists of different lengths: {segment}")
            has_support = [entry is not None for entry in segment["support"]]
            check(has_support == [bool(mask) for mask in segment["loss_mask"]], f"supports without mask: {segment}")
        if document:
            found = [step for segment in document["segments"] for step in segment["steps"]]
            check(found == list(range(episode.num_steps)), f"the segments have the steps {found}")

    async def read_messages(self, episode: Episode, replica: Replica) -> None:
        document = await self._read(replica, episode, "messages")
        if document:
            found = [message["content"] for message in document["messages"] if message["role"] == "assistant"]
            known = [taken.answer.get("text", text) for taken, text in zip(episode.steps, found, strict=True)]
            check(found == known, f"the actions are {found}, expected {known}")

    async def _read(self, replica: Replica, episode: Episode, format: str) -> Any:
        expected = {"episode_deleted"} if episode.deleted else {"ok"}
        path = f"/episode/{episode.name}/trajectory"
        return await self.plain(format, replica, episode.tenant, "GET", path, expected, query={"format": format})

    async def read_other(self, replica: Replica, episode: Episode, tenant: str) -> None:
        """Reads an id as another tenant, which must not see this tenant's episode."""
        if (tenant, episode.name) not in self.episodes:
            for kind, method, path, body in (
                ("read", "GET", f"/episode/{episode.name}", None),
                ("trajectory", "GET", f"/episode/{episode.name}/trajectory", None),
                ("delete", "DELETE", f"/episode/{episode.name}", None),
                ("fork", "POST", f"/episode/{episode.name}/fork", {}),
                ("feedback", "POST", f"/episode/{episode.name}/feedback", {"rating": 1}),
            ):
                await self.plain(kind, replica, tenant, method, path, {"episode_not_found"}, body)

    async def read_list(self, replica: Replica, tenant: str, limit: int) -> None:
        names: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            query = {"tag": self.prefix, "limit": limit, **cursor}
            page = await self.plain("list", replica, tenant, "GET", "/episode", {"ok"}, query=query)
            if page is None:
                return  # over the rate limit
            names += [found["episode_id"] for found in page["episodes"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        expected = [name for (owner, name), episode in self.episodes.items() if owner == tenant and not episode.deleted]
        check(names == expected[::-1], f"the list has {names}, expected {expected[::-1]}")

    async def read_export(self, replica: Replica, tenant: str) -> None:
        mine = [episode for (owner, _), episode in self.episodes.items() if owner == tenant]
        if not all(self.is_settled(episode) for episode in mine):
            return
        lines = await self.plain("export", replica, tenant, "GET", "/export", {"ok"}, query={"tag": self.prefix})
        if lines is None:
            return
        expected = [episode for episode in mine[::-1] if episode.stop_reason and not episode.deleted]
        names = [line["episode"]["episode_id"] for line in lines]
        check(names == [episode.name for episode in expected], f"the export has {names}")
        for line, episode in zip(lines, expected, strict=True):
            self._compare(episode, line)

    # --- faults

    async def fail(self, replica: Replica, fault: Any) -> None:
        """Injects a fault, or restarts the replica."""
        self.world.log.append(f"   replica {replica.number}: {fault}")
        match fault:
            case "restart":
                await self.restart(replica)
            case "engine":
                await self.kill_engine(replica)
            case "nan":
                replica.engine.has_nan = True
            case _ if replica.gate is None:
                replica.fault = fault

    async def restart(self, replica: Replica) -> None:
        """Ends a replica as SIGTERM does, and starts it again on the same store."""
        await replica.stop()
        replica.may_load.set()
        await replica.start()
        self.world.buckets.reset(replica.number)
        await self.release(code="draining", at=replica)

    async def kill_engine(self, replica: Replica) -> None:
        replica.kill_engine()
        await quiescence()
        await self.release(code="engine_unavailable", at=replica)

    async def recover(self) -> None:
        for replica in self.world.replicas:
            replica.engine.has_nan, replica.fault = False, None
            replica.may_load.set()
            await replica.until_ready()

    # --- time

    async def pass_time(self) -> None:
        """Lets more time pass than the idle timeout of episodes."""
        if not any(replica.may_load.is_set() and replica.gate != "commits" for replica in self.world.replicas):
            await self.release()
            await self.recover()  # episodes expire where an engine serves and commits do not wait
        self.world.clock.advance(2 * TTL_S)
        for replica in self.world.replicas:
            replica.services.sessions.expiry.expect(0.0)
        await quiescence()
        for episode in self.episodes.values():
            if episode.is_active and "idle_ttl_s" in episode.body:
                episode.may_expire = True
                episode.is_late = any(flight.is_committing for flight in episode.flights.values())
                await self._until_expired(episode)

    # --- the end of the sequence

    async def finish(self) -> None:
        """Checks that all that is stored is as expected, and that nothing of the sequence goes on."""
        world = self.world
        await self.recover()
        await self.release()
        for number, episode in enumerate(self.episodes.values()):
            await self.verify(episode, world.replicas[number % len(world.replicas)])
            if episode.is_active:
                await self.send(
                    world.replicas[number % len(world.replicas)], [Request("end", episode.tenant, episode.name, {})]
                )
        world.clock.advance(10)
        await quiescence()
        self._check_nothing_left()

    def _check_nothing_left(self) -> None:
        for replica in self.world.replicas:
            limits = replica.services.admission
            check(not limits._num_acts and not limits._num_running, "acts are admitted that have ended")
            check(not any(episode.in_flight for episode in replica.services.sessions._cache), "an act is in flight")
        for gauge in ("agent_active_acts", "agent_running_acts", "agent_waiting_acts"):
            check(REGISTRY.get_sample_value(gauge) == 0, f"{gauge} is {REGISTRY.get_sample_value(gauge)}")
        check(failures() == self._at_start, "an unexpected failure was counted")
        check(not self.world.background_failures, f"in the background: {self.world.background_failures}")
        extra = tasks() - self.world.num_tasks
        check(not extra, f"tasks are left: {extra}: {asyncio.all_tasks()}")
