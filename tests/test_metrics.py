"""Metrics: each documented name appears in GET /metrics and moves when what it counts happens."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from service import metrics
from service.engine.scripted import ScriptedEngine
from service.engine.tokenizer import HFTokenizer
from tests.serving import HeldEngine, Served, serve, until

OURS: set[Any] = {value for value in vars(metrics).values() if isinstance(value, Counter | Gauge | Histogram)}
NAMES = {family.name for metric in OURS for family in metric.describe()}

Samples = dict[tuple[str, str], float]


async def samples(api: Served) -> Samples:
    """Values by sample name and the value of its one label."""
    text = (await api.client.get("/metrics")).text
    return {
        (sample.name, next((v for k, v in sample.labels.items() if k != "le"), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("agent_")
    }


def moved(before: Samples, after: Samples, name: str, label: str = "") -> float:
    return after.get((name, label), 0.0) - before.get((name, label), 0.0)


def test_names_have_one_prefix_and_are_registered_once():
    assert len(NAMES) == len(OURS) > 8
    assert all(name.startswith("agent_") for name in NAMES)
    registered = [family.name for family in REGISTRY.collect() if family.name.startswith("agent_")]
    assert sorted(registered) == sorted(NAMES)


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
