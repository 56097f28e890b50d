"""A replica whose cached episode is not the store's: what it answers, and how much it reads to find out."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.tokenizer import HFTokenizer
from service.store.sql import SQLStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Step, StoredEpisode
from tests.support.serving import DISCRETE, HeldEngine, Served, serve, until


@asynccontextmanager
async def replicas(folder: Path, tokenizer: HFTokenizer) -> AsyncIterator[tuple[Served, Served]]:
    """Runs two replicas with the same store."""
    async with serve(folder, ScriptedEngine(tokenizer)) as one, serve(folder, ScriptedEngine(tokenizer)) as two:
        yield one, two


async def call(api: Served, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
    return await api.client.request(method, path, json=body, headers=headers)


LOOK = {"episode_id": "e", "observation": "look"}
KEY = {"Idempotency-Key": "first"}
STREAM = {"Accept": "text/event-stream"}


def acts(name: str) -> list[dict[str, Any]]:
    """Returns bodies of POST /act for an episode with one step: retries, new steps, and steps that are refused."""
    look = {"episode_id": name, "observation": "look"}
    return [
        look,
        {**look, "step": 0},
        {**look, "step": 1},
        {**look, "step": 9},
        {**look, "step": 0, "observation": "another body for the step"},
        {**look, "step": 1, "legal_actions": ["fly"]},
        {"episode_id": name, "terminated": True},
    ]


def other_calls(name: str) -> list[tuple[str, str, Any]]:
    """Returns method, path and body of the other calls about an episode."""
    path = f"/episode/{name}"
    return [
        ("POST", f"{path}/action", {"observation": "look", "action": "left", "step": 1}),
        ("POST", f"{path}/end", {"terminated": True}),
        ("POST", f"{path}/fork", {}),
        ("POST", f"{path}/fork", {"at_step": 1}),
        ("POST", f"{path}/fork", {"at_step": 9}),
        ("POST", "/episode/other/fork", {"episode_ids": [name]}),
        ("POST", f"{path}/feedback", {"rating": 5, "step": 0}),
        ("GET", path, None),
        ("GET", f"{path}/trajectory", None),
        ("DELETE", path, None),
        ("POST", "/episode", {"episode_id": name, "action_space": DISCRETE}),
    ]


def answer_code(answer: httpx.Response) -> Any:
    """Returns status and code of a problem, whether it is a response, the last event of a stream, or in a batch."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        problem = json.loads(answer.text.rpartition("data: ")[2])
    else:
        problem = answer.json()["results"][0] if "results" in answer.text else answer.json()
    return problem.get("status"), problem.get("code")


@pytest.mark.parametrize("ended", [False, True], ids=["active", "ended"])
@pytest.mark.parametrize("knows_step", [False, True], ids=["unknown step", "known step"])
async def test_an_episode_that_another_replica_deleted_is_gone(
    tmp_path: Path, tokenizer: HFTokenizer, ended: bool, knows_step: bool
):
    """A fork keeps the rows of its deleted parent, so the rows alone do not tell that the parent is deleted."""
    async with replicas(tmp_path, tokenizer) as (stale, other):
        await stale.open("other")
        names = (f"e{number}" for number in count())

        async def check(make: Callable[[str], tuple[str, str, Any]], **headers: str) -> None:
            name = next(names)
            await stale.open(name, action_space=DISCRETE)
            actor = stale if knows_step else other
            assert (await actor.post_act(name, headers=KEY)).status_code == 200
            if ended:
                await actor.act(name, observation=None, truncated=True)
            fork = {"episode_ids": [f"{name}-kept"]}
            assert (await call(other, "POST", f"/episode/{name}/fork", fork)).status_code == 201
            assert (await call(other, "DELETE", f"/episode/{name}")).status_code == 204
            case = make(name)
            assert answer_code(await call(stale, *case, **headers)) == (410, "episode_deleted"), (case, headers)
            assert (await other.act(f"{name}-kept", observation="go on", step=1))["step"] == 1

        for number in range(len(acts(""))):
            for headers in ({}, KEY, STREAM):
                await check(lambda name, number=number: ("POST", "/act", acts(name)[number]), **headers)
            await check(lambda name, number=number: ("POST", "/act/batch", {"acts": [acts(name)[number]]}))
        for number in range(len(other_calls(""))):
            await check(lambda name, number=number: other_calls(name)[number])


async def test_an_episode_deleted_elsewhere_is_gone_while_its_act_is_in_flight(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer)) as stale, serve(tmp_path, ScriptedEngine(tokenizer)) as other:
        await stale.open()
        acting = asyncio.create_task(stale.post_act(step=0))
        await until(lambda: stale.engine.num_held == 1)
        assert (await call(other, "DELETE", "/episode/e")).status_code == 204
        for method, path, body in (
            ("POST", "/episode/e/end", {}),
            ("DELETE", "/episode/e", None),
            ("POST", "/act", {**LOOK, "observation": "other"}),
        ):
            answer = await call(stale, method, path, body)
            assert (answer.status_code, answer.json()["code"]) == (410, "episode_deleted"), path
        stale.engine.release.set()
        answer = await acting
        assert (answer.status_code, answer.json()["code"]) == (410, "episode_deleted")


async def test_an_act_that_was_overtaken_keeps_the_episode_from_neither_its_end_nor_its_deletion(
    tmp_path: Path, tokenizer: HFTokenizer
):
    async with serve(tmp_path, HeldEngine(tokenizer)) as slow, serve(tmp_path, ScriptedEngine(tokenizer)) as fast:
        for name, method, path in (("a", "POST", "/episode/a/end"), ("b", "DELETE", "/episode/b")):
            await slow.open(name)
            acting = asyncio.create_task(slow.post_act(name, step=0))
            await until(lambda: slow.engine.num_held == 1)
            busy = await call(slow, method, path, {})
            assert (busy.status_code, busy.json()["code"]) == (409, "episode_busy")
            await fast.act(name, step=0)
            assert (await call(slow, method, path, {})).status_code in (200, 204)
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
            await until(lambda: slow.engine.num_aborted == 1)
            slow.engine.num_held = slow.engine.num_aborted = 0


async def test_a_refusal_by_a_stale_copy_is_checked_against_the_store(tmp_path: Path, tokenizer: HFTokenizer):
    """The stale copy has a return to which the reward cannot be added. The store's has room for it."""
    async with replicas(tmp_path, tokenizer) as (stale, other):
        await stale.open()
        await stale.act(step=0)
        await stale.act(reward=1.7e308, step=1)
        await other.act(reward=-1.7e308, step=2)
        assert (await stale.act(reward=1.7e308, step=3))["step"] == 3


async def test_an_act_that_loses_a_race_after_its_copy_was_stale_is_judged_by_what_is_stored(
    tmp_path: Path, tokenizer: HFTokenizer
):
    async with serve(tmp_path, HeldEngine(tokenizer)) as slow, serve(tmp_path, ScriptedEngine(tokenizer)) as fast:
        await slow.open()
        await fast.act(step=0)  # so the copy of `slow` is stale
        acting = asyncio.create_task(slow.post_act(observation="mine", step=1))
        await until(lambda: slow.engine.num_held == 1)
        await fast.act(observation="another", step=1)
        slow.engine.release.set()
        answer = await acting
        assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_mismatch")


class CountedReads(SQLStore):
    """Counts the reads of whole trajectories."""

    num_trajectories = 0

    async def trajectory(self, episode_id: str) -> tuple[StoredEpisode, list[Step]] | None:
        self.num_trajectories += 1
        return await super().trajectory(episode_id)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        self.num_trajectories += index is None
        return await super().steps(episode_id, index)


@pytest.mark.store("sqlite")
async def test_refused_acts_and_ends_read_no_trajectory(tmp_path: Path, tokenizer: HFTokenizer):
    store = CountedReads(f"sqlite:///{tmp_path}/db")
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store, max_live_episodes=2) as api:
        await api.open()
        await api.act(step=0)
        for fields in ({"step": 99}, {"step": 0, "observation": "other"}, {"legal_actions": ["x"]}):
            assert (await api.post_act(**fields)).status_code in (409, 422)
        assert store.num_trajectories == 0
        for name in ("b", "c"):
            await api.open(name)  # evicts e
        assert (await call(api, "POST", "/episode/e/end", {"reward": 1.0})).json()["episode_return"] == 1.0
        assert store.num_trajectories == 0


@pytest.mark.store("sqlite")
async def test_idle_expiry_reads_no_trajectory_and_evicts_no_episode(tmp_path: Path, tokenizer: HFTokenizer):
    store = CountedReads(f"sqlite:///{tmp_path}/db")
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store) as api:
        for number in range(5):
            await api.open(f"idle{number}", idle_ttl_s=0.5)
            await api.act(f"idle{number}")
    store = CountedReads(f"sqlite:///{tmp_path}/db")
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store, max_live_episodes=1) as api:
        await api.open("hot")
        hot = api.app.state.services.sessions._cache.peek("hot")
        async with asyncio.timeout(20):
            for number in range(5):
                while (ended := await api.get(f"idle{number}"))["status"] == "active":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                assert (ended["stop_reason"], ended["step"]) == ("idle_ttl", 1)
        assert store.num_trajectories == 0
        assert api.app.state.services.sessions._cache.peek("hot") is hot


async def test_an_act_on_an_episode_that_expires_meanwhile_is_refused(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer)) as slow, serve(tmp_path, ScriptedEngine(tokenizer)) as other:
        await slow.open()
        acting = asyncio.create_task(slow.post_act(step=0))
        await until(lambda: slow.engine.num_held == 1)
        assert (await call(other, "POST", "/episode/e/end", {"truncated": True})).status_code == 200
        slow.engine.release.set()
        answer = await acting
        assert (answer.status_code, answer.json()["code"]) == (409, "episode_ended")


async def test_a_retry_at_a_replica_whose_engine_died_gets_the_stored_step(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    async with replicas(tmp_path, tokenizer) as (one, two):
        await one.open(action_space=DISCRETE)
        await one.get()
        stored = await two.act(step=0)
        one.engine.die()
        retried = await one.post_act(step=0)
        assert retried.status_code == 200, retried.text
        assert retried.json()["replayed"]
        assert retried.json()["action"] == stored["action"]
        assert (await one.post_act(step=1)).json()["code"] == "engine_unavailable"


@pytest.mark.parametrize("headers", [{}, KEY, STREAM], ids=["plain", "key", "stream"])
async def test_an_episode_is_not_confused_with_a_purged_one_of_the_same_id(
    tmp_path: Path, tokenizer: HFTokenizer, headers: dict[str, str]
):
    """Another replica purged the episode and opened a new one with its id, which has as many steps."""
    async with replicas(tmp_path, tokenizer) as (stale, other):
        await stale.open(action_space=DISCRETE)
        await stale.act(observation="of the old episode", step=0)
        await call(other, "POST", "/episode/e/end", {})
        store = other.app.state.services.sessions.store
        assert await store.delete_ended(math.inf, 10) == ["e"]
        assert await store.remove_tombstones(math.inf, 10) == 1
        await other.open()
        first = await other.act(observation="of the new episode", step=0)
        assert (await call(stale, "POST", "/episode/e/fork", {"episode_ids": ["f"]})).status_code == 201
        assert (await stale.act("f", observation="go on"))["action"] == "ok"
        answer = await stale.post_act(observation="go on", step=1, headers=headers)
        assert answer.status_code == 200, answer.text
        prompt = tokenizer.decode(stale.engine.prompts[-1])
        assert "of the new episode" in prompt
        assert "of the old episode" not in prompt
        assert [step["action"] for step in (await stale.trajectory())["steps"]] == [first["action"], "ok"]
