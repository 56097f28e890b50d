"""Metrics: each one appears in GET /metrics, and changes when the event that it counts happens."""

import asyncio
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, Histogram
from prometheus_client.parser import text_string_to_metric_families

from service.api.http.problems import CODES
from service.engine.tokenizer import HFTokenizer
from service.lifecycle import Phase
from service.observability import metrics
from service.observability.fast_metrics import FastHistogram
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import StopReason, StoredEpisode
from tests.support.serving import HeldEngine, Served, serve, until

OURS = [family.name for family in REGISTRY.collect() if family.name.startswith("agent_")]
NAMES = set(OURS)

Samples = dict[tuple[str, str], float]


async def samples(api: Served) -> Samples:
    """Returns the values of GET /metrics by sample name and the value of the first label (`le` aside)."""
    text = (await api.client.get("/metrics")).text
    return {
        (sample.name, next((v for k, v in sample.labels.items() if k != "le"), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("agent_")
    }


def moved(before: Samples, after: Samples, name: str, label: str = "") -> float:
    return after.get((name, label), 0.0) - before.get((name, label), 0.0)


def test_names_are_registered_once():
    assert len(NAMES) == len(OURS) > 8


async def test_an_episode_moves_them(tmp_path: Path, tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer, reply=lambda _: "no json")
    async with serve(tmp_path, engine) as api:
        before = await samples(api)
        await api.open("text")
        answer = await api.act("text", step=0)
        await api.act("text", step=0)
        await api.post_act("text", step=9)
        await api.act("text", observation=None, terminated=True)
        await api.open("json", action_space={"type": "json", "schema": {"type": "integer"}})
        await api.act("json")
        await api.post_act("nobody")
        after = await samples(api)
    for outcome, count in (("acted", 2), ("done", 1), ("replayed", 1), ("step_conflict", 1), ("episode_not_found", 1)):
        assert moved(before, after, "agent_acts_total", outcome) == count, outcome
    assert moved(before, after, "agent_episodes_started_total") == 2
    assert moved(before, after, "agent_episodes_ended_total", "terminated") == 1
    assert moved(before, after, "agent_active_episodes") == 1
    assert moved(before, after, "agent_parse_failures_total", "json") == 1
    assert moved(before, after, "agent_tokens_total", "prompt") > answer["usage"]["prompt_tokens"]
    assert moved(before, after, "agent_tokens_total", "completion") > answer["usage"]["completion_tokens"]
    assert ("agent_tokens_total", "cached") in after
    for part in ("queue_s", "engine_s", "store_s", "total_s"):
        assert moved(before, after, "agent_act_seconds_count", part) == 3
    assert moved(before, after, "agent_store_commits_total") == 5
    assert moved(before, after, "agent_store_commit_seconds_count") == 5
    assert moved(before, after, "agent_store_batch_size_sum") == 5


async def test_all_appear(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        answer = await api.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        found = {family.name for family in text_string_to_metric_families(answer.text)}
        assert {n for n in found if n.startswith("agent_") and not n.endswith("_created")} == NAMES


def test_fast_histogram_counts_like_that_of_prometheus_client():
    bounds = (0.1, 1.0, 2.5)
    fast = FastHistogram("test_fast", "A test.", ["part"], buckets=bounds)
    slow = Histogram("test_slow", "A test.", ["part"], buckets=bounds)
    for value in (0.0, 0.1, 0.10001, 1.0, 2.5, 7.0):
        fast.labels("a").observe(value)
        slow.labels("a").observe(value)
    try:
        found = [
            [(sample.name[9:], sample.labels, sample.value) for sample in metric.samples]
            for metric in (*fast.collect(), *slow.collect())
        ]
        assert found[0] == found[1]
    finally:
        REGISTRY.unregister(fast)
        REGISTRY.unregister(slow)


async def test_acts_in_flight_and_live_episodes_go_up_and_down(tmp_path: Path, tokenizer: HFTokenizer):
    engine = HeldEngine(tokenizer)
    async with serve(tmp_path, engine, max_live_episodes=2) as api:
        for number in range(4):
            await api.open(f"e{number}")
        before = await samples(api)
        assert before[("agent_live_episodes", "")] == 2
        acts: list[Any] = [asyncio.create_task(api.post_act("e0")), asyncio.create_task(api.post_act("e1"))]
        await until(lambda: engine.num_held == 2)
        assert moved(before, await samples(api), "agent_active_acts") == 2
        assert moved(before, await samples(api), "agent_tasks") >= 2
        engine.release.set()
        await asyncio.gather(*acts)
        assert moved(before, await samples(api), "agent_active_acts") == 0


def scraped(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Returns {sample name: {label values, in the order of the labels' names: value}}."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


async def test_an_ended_episode_tells_its_return_and_length_once(tmp_path: Path, tokenizer: HFTokenizer):
    async def now(api: Served) -> dict[str, dict[tuple[str, ...], float]]:
        return scraped((await api.client.get("/metrics")).text)

    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        before = await now(api)
        for name, profile, reward in (("won", "frozen-lake", 1.0), ("lost", "frozen-lake", -2.5), ("free", None, 0.25)):
            await api.open(name, **({"profile": profile} if profile else {}))
            await api.act(name)
            await api.act(name, reward=reward)
            await api.act(name, observation=None, truncated=True)
            await api.client.post(f"/episode/{name}/end", json={})
        after = await now(api)

    def grown(name: str, *labels: str) -> float:
        return after[name][labels] - before.get(name, {}).get(labels, 0.0)

    assert grown("agent_episode_return_count", "frozen-lake") == 2
    assert grown("agent_episode_return_bucket", "0.0", "frozen-lake") == 1
    assert grown("agent_returns_total", "frozen-lake", "positive") == 1.0
    assert grown("agent_returns_total", "frozen-lake", "negative") == 2.5
    assert grown("agent_returns_total", "none", "positive") == 0.25
    assert grown("agent_episode_steps_sum", "frozen-lake") == 4
    assert grown("agent_episodes_ended_total", "truncated") == 3


async def test_requests_count_by_route_and_never_by_what_a_caller_wrote(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        before = scraped((await api.client.get("/metrics")).text).get("agent_http_requests_total", {})
        await api.open()
        await api.act()
        await api.get()
        await api.post_act("nobody")
        await api.client.get("/nowhere/at-all")
        await api.client.put("/act", json={})
        after = scraped((await api.client.get("/metrics")).text)["agent_http_requests_total"]
    grown = {labels: value - before.get(labels, 0.0) for labels, value in after.items() if value != before.get(labels)}
    assert grown == {
        ("/episode", "201"): 1,
        ("/act", "200"): 1,
        ("/episode/{episode_id}", "200"): 1,
        ("/act", "404"): 1,
        ("-", "404"): 1,
        ("/act", "405"): 1,
        ("/metrics", "200"): 1,
    }


async def test_the_state_is_that_of_readyz_and_the_info_that_of_version(tmp_path: Path, tokenizer: HFTokenizer):
    async def states(api: Served) -> tuple[list[str], list[tuple[str, ...]]]:
        found = scraped((await api.client.get("/metrics")).text)
        assert set(found["agent_readiness"]) == {(state,) for state in metrics.STATES}
        return [state for (state,), value in found["agent_readiness"].items() if value], list(found["agent_info"])

    async with serve(tmp_path, None, store=MemoryStore(), loading=True) as api:
        version = (await api.client.get("/version")).json()["version"]
        assert await states(api) == (["loading"], [("", "", version)])
        api.app.state.services.lifecycle.enter(Phase.DRAINING)
        assert await states(api) == (["draining"], [("", "", version)])
        assert (await api.client.get("/version")).json()["policy"] is None
    engine = ScriptedEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        assert await states(api) == (["ready"], [("scripted", "scripted-1", version)])
        with sqlite3.connect(tmp_path / "episodic.db", isolation_level=None) as connection:
            connection.execute("ALTER TABLE episodes RENAME TO hidden")
            assert (await states(api))[0] == ["store_unavailable"]
            connection.execute("ALTER TABLE hidden RENAME TO episodes")
        connection.close()
        engine.die()
        assert (await states(api))[0] == ["engine_unavailable"]


async def test_a_scrape_does_not_wait_for_a_store_that_hangs(tmp_path: Path, tokenizer: HFTokenizer):
    class Hanging(MemoryStore):
        hangs = False

        async def episode(self, episode_id: str) -> StoredEpisode | None:
            return await (asyncio.get_running_loop().create_future() if self.hangs else super().episode(episode_id))

    store = Hanging()
    async with serve(tmp_path, ScriptedEngine(tokenizer), store=store) as api:
        await api.open()
        assert (await samples(api))["agent_active_episodes", ""] == 1
        store.hangs = True
        found = await samples(api)
        assert found["agent_readiness", "store_unavailable"] == 1
        assert math.isnan(found["agent_active_episodes", ""])
        answer = await api.client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "store_unavailable")


async def test_a_count_that_takes_long_is_unknown_and_no_reason_to_be_unready(tmp_path: Path, tokenizer: HFTokenizer):
    class Slow(MemoryStore):
        async def num_active(self, tenant: str | None = None) -> int:
            return await asyncio.get_running_loop().create_future()

    async with serve(tmp_path, ScriptedEngine(tokenizer), store=Slow()) as api:
        found = await samples(api)
        assert found["agent_readiness", "ready"] == 1
        assert math.isnan(found["agent_active_episodes", ""])


async def test_a_profiles_first_episode_is_counted_from_zero_on(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        profiles = {label for name, label in await samples(api) if name == "agent_episode_return_count"}
        assert profiles >= {profile.name for profile in api.app.state.services.profiles} | {"none"}


def test_what_has_not_happened_yet_is_zero_and_not_missing():
    known = {code for codes in CODES.values() for code in codes} | {"acted", "done", "replayed"}
    assert set(metrics.OUTCOMES) <= known
    for counter, label, values in (
        (metrics.ACTS, "outcome", metrics.OUTCOMES),
        (metrics.EPISODES_ENDED, "stop_reason", tuple(StopReason)),
        (metrics.PARSE_FAILURES, "kind", ("json", "length", "schema")),
    ):
        (family,) = counter.collect()
        assert set(values) <= {sample.labels[label] for sample in family.samples}


async def test_an_act_that_fails_for_no_reason_of_ours_counts_as_internal(tmp_path: Path, tokenizer: HFTokenizer):
    def broken(_: Any) -> str:
        raise ZeroDivisionError

    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=broken)) as api:
        before = await samples(api)
        await api.open()
        assert (await api.post_act()).status_code == 500
        after = await samples(api)
        assert moved(before, after, "agent_acts_total", "internal_error") == 1
        assert moved(before, after, "agent_unexpected_failures_total") == 1


async def test_errors_of_engine_and_store_count_by_their_code(tmp_path: Path, tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        await api.open()
        before = await samples(api)
        engine.die()
        await api.post_act()
        assert moved(before, await samples(api), "agent_acts_total", "engine_unavailable") == 1


async def test_episodes_from_before_a_restart_are_active_too(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        before = await samples(api)
        await api.open("one")
        await api.open("two")
    metrics.ACTIVE_EPISODES.set(0)  # as in a new process
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        assert (await samples(api))[("agent_active_episodes", "")] == 2
        await api.client.post("/episode/one/end", json={})
        await api.client.delete("/episode/two")
        assert (await samples(api))[("agent_active_episodes", "")] == 0
    metrics.ACTIVE_EPISODES.set(before[("agent_active_episodes", "")])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_is_described(name: str):
    (family,) = [family for family in REGISTRY.collect() if family.name == name]
    assert family.documentation.endswith(".")
