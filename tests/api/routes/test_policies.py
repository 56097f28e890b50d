"""Adapters over HTTP: loading, listing, choosing, replacing and removing them, and restarts of the service."""

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from service.store.base import StoreUnavailable
from service.testing.scripted_engine import ScriptedEngine
from tests.support.adapters import make_adapter
from tests.support.serving import DISCRETE, Served, serve


def engine(tokenizer: HFTokenizer) -> ScriptedEngine:
    made = ScriptedEngine(tokenizer)
    made.info = dataclasses.replace(made.info, max_lora_rank=8)
    return made


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    for seed, name in enumerate(("one", "two"), start=1):
        make_adapter(tmp_path / "adapters-in" / name, seed)
    async with serve(tmp_path, engine(tokenizer), adapters=tmp_path / "adapters-in") as served:
        yield served


async def load(api: Served, name: str = "walker", path: str = "one") -> dict[str, Any]:
    answer = await api.client.put(f"/policy/{name}", json={"path": path})
    assert answer.status_code in (200, 201), answer.text
    return {**answer.json(), "status": answer.status_code}


async def names(api: Served) -> list[str]:
    return [policy["name"] for policy in (await api.client.get("/policy")).json()["policies"]]


async def test_an_adapter_is_loaded_listed_chosen_replaced_and_removed(api: Served):
    assert await names(api) == ["scripted"]
    first = await load(api)
    assert first.items() >= {"status": 201, "kind": "adapter", "base": "scripted", "rank": 4}.items()
    assert await names(api) == ["scripted", "walker"]
    opened = await api.open(policy="walker", action_space=DISCRETE)
    assert (opened["policy"], opened["policy_version"]) == ("walker", first["policy_version"])
    plain = await api.open("base", action_space=DISCRETE)
    assert plain["policy"] == "scripted"
    act = await api.act()
    assert act["policy_version"] == first["policy_version"]
    assert act["action_probs"] != (await api.act("base"))["action_probs"]

    second = await load(api, path="two")
    assert second["status"] == 200
    assert second["policy_version"] != first["policy_version"]
    assert (await api.act(observation="on"))["policy_version"] == second["policy_version"], (
        "the new adapter does not act from the next step on"
    )
    versions = (await api.trajectory(format="tokens"))["segments"][0]["policy_versions"]
    assert versions == [first["policy_version"], second["policy_version"]]
    assert len(api.engine.adapters) == 1

    assert (await api.client.delete("/policy/walker")).status_code == 204
    assert api.engine.adapters == []
    gone = await api.post_act(observation="on")
    assert (gone.status_code, gone.json()["code"]) == (503, "engine_unavailable")
    assert "walker" in gone.json()["detail"]
    await load(api, path="two")
    assert (await api.act(observation="on", step=2))["policy_version"] == second["policy_version"]


async def test_the_same_files_again_change_nothing(api: Served):
    first = await load(api)
    again = await load(api)
    assert {**again, "status": 201} == first


async def test_adapters_are_there_after_a_restart(api: Served, tmp_path: Path, tokenizer: HFTokenizer):
    version = (await load(api))["policy_version"]
    await load(api, "gone")
    await api.client.delete("/policy/gone")
    await api.open(policy="walker", action_space=DISCRETE)
    make_adapter(tmp_path / "adapters-in" / "one", 9)
    async with serve(tmp_path, engine(tokenizer), adapters=tmp_path / "adapters-in") as second:
        assert await names(second) == ["scripted", "walker"]
        assert (await second.act())["policy_version"] == version, "the changed folder was loaded instead of the copy"
    async with serve(tmp_path, engine(tokenizer)) as off:
        assert await names(off) == ["scripted"]
        assert (await off.post_act(observation="on")).json()["code"] == "engine_unavailable"


@pytest.mark.parametrize(
    ("name", "path", "word"),
    [
        ("walker", "none", "no folder"),
        ("walker", "..", "no folder"),
        ("walker", "/etc", "no folder"),
        ("walker", "one/../../../etc", "no folder"),
        ("walker", "high", "rank"),
        ("scripted", "one", "base model"),
    ],
)
async def test_invalid_adapter_is_refused_and_changes_nothing(
    api: Served, tmp_path: Path, name: str, path: str, word: str
):
    make_adapter(tmp_path / "adapters-in" / "high", 1, rank=16)
    version = (await load(api))["policy_version"]
    answer = await api.client.put(f"/policy/{name}", json={"path": path})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert word in answer.json()["detail"]
    assert str(tmp_path) not in answer.text
    policies = (await api.client.get("/policy")).json()["policies"]
    assert [policy["policy_version"] for policy in policies] == ["scripted-1", version]


async def test_what_is_not_there_cannot_be_removed_or_chosen(api: Served):
    answer = await api.client.delete("/policy/none")
    assert (answer.status_code, answer.json()["code"]) == (404, "policy_not_found")
    assert (await api.client.delete("/policy/scripted")).status_code == 422
    assert (await api.client.post("/episode", json={"policy": "none"})).status_code == 422


async def test_adapters_are_off_unless_a_folder_is_named(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, engine(tokenizer)) as api:
        answer = await api.client.put("/policy/walker", json={"path": "one"})
        assert answer.status_code == 422
        assert "EPISODIC_ADAPTERS" in answer.json()["detail"]


async def test_an_adapter_that_could_not_be_kept_is_not_served(api: Served, monkeypatch: pytest.MonkeyPatch):
    await load(api)
    store = api.app.state.services.sessions.store
    with monkeypatch.context() as broken:

        async def fail(_: Any) -> None:
            raise StoreUnavailable("down")

        broken.setattr(store, "put_policy", fail)
        refused = await api.client.put("/policy/walker", json={"path": "two"})
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
    assert len(api.engine.adapters) == 1, "the new adapter is still loaded"
    assert (await load(api))["status"] == 200
    again = await load(api, path="two")
    assert [policy.version for policy in await store.policies()] == [again["policy_version"]]


@pytest.mark.parametrize("path", ["a\0b", "x" * 1000, "x/" * 500, "..", "/", "."])
async def test_a_path_that_leads_nowhere_is_refused(api: Served, path: str):
    answer = await api.client.put("/policy/walker", json={"path": path})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_what_was_opened_is_found_after_its_policy_is_gone(api: Served):
    await load(api)
    opened = await api.open(policy="walker")
    await api.client.delete("/policy/walker")
    again = await api.client.post("/episode", json={"episode_id": "e", "policy": "walker"})
    assert (again.status_code, again.json()) == (200, opened)
    other = await api.client.post("/episode", json={"episode_id": "e", "policy": "walker", "goal": "other"})
    assert other.status_code == 422
    ended = await api.act(observation="home", reward=1.0, terminated=True)
    assert ended["done"], "ending an episode needs no policy"
