"""Adapters over HTTP: versions and the names that point to them, pinned episodes, replicas, and restarts."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.main import app as cli
from service.engine.tokenizer import HFTokenizer
from service.store.base import StoreUnavailable
from service.store.sql import SQLStore
from service.testing.scripted_engine import ScriptedEngine
from tests.support.adapters import make_adapter
from tests.support.databases import execute
from tests.support.serving import DISCRETE, Served, serve, until


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


async def load(api: Served, name: str = "walker", path: str = "one", **fields: Any) -> dict[str, Any]:
    answer = await api.client.put(f"/policy/{name}", json={"path": path, **fields})
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
    assert (await api.act(observation="on"))["policy_version"] == first["policy_version"]
    assert (await api.open("new", policy="walker"))["policy_version"] == second["policy_version"]
    versions = (await api.trajectory(format="tokens"))["segments"][0]["policy_versions"]
    assert versions == [first["policy_version"]] * 2

    assert (await api.client.delete("/policy/walker")).status_code == 204
    assert await names(api) == ["scripted"]
    assert (await api.act(observation="on"))["policy_version"] == first["policy_version"], "the version is gone, too"
    assert (await api.client.post("/episode", json={"policy": "walker"})).status_code == 422
    assert (await api.open("again", policy=first["version"]))["policy_version"] == first["policy_version"]


async def test_an_episode_that_follows_acts_with_the_version_of_the_moment(api: Served):
    first = await load(api)
    opened = await api.open(policy="walker", policy_updates="follow", action_space=DISCRETE)
    assert (opened["policy_updates"], opened["policy_version"]) == ("follow", first["policy_version"])
    await api.act()
    second = await load(api, path="two")
    assert (await api.act(observation="on"))["policy_version"] == second["policy_version"]
    await api.client.post("/policy/walker/rollback")
    assert (await api.act(observation="on"))["policy_version"] == first["policy_version"]
    versions = (await api.trajectory(format="tokens"))["segments"][0]["policy_versions"]
    assert versions == [one["policy_version"] for one in (first, second, first)]
    await api.client.delete("/policy/walker")
    gone = await api.post_act(observation="on")
    assert (gone.status_code, gone.json()["code"]) == (503, "engine_unavailable")
    assert "walker" in gone.json()["detail"]
    await load(api, path="two")
    assert (await api.act(observation="on", step=3))["policy_version"] == second["policy_version"]


async def test_a_version_is_loaded_beside_the_current_one_and_both_act(api: Served):
    first = await load(api)
    other = await load(api, path="two", alias=False, parent=first["version"], round=4)
    assert (other["status"], other["current"], other["parent"], other["round"]) == (201, False, first["version"], 4)
    for name, policy in (("a", "walker"), ("b", other["version"]), ("c", f"walker@{other['digest']}")):
        opened = await api.open(name, policy=policy, action_space=DISCRETE)
        assert (opened["policy"], opened["policy_updates"]) == (policy, "pinned")
    acts = [{"episode_id": name, "observation": "look"} for name in ("a", "b", "c")]
    results = (await api.client.post("/act/batch", json={"acts": acts})).json()["results"]
    assert [one["policy_version"] for one in results] == [
        first["policy_version"],
        other["policy_version"],
        other["policy_version"],
    ]
    assert results[0]["action_probs"] != results[1]["action_probs"] == results[2]["action_probs"]
    answer = await api.client.put("/policy/walker", json={"version": other["version"], "evaluation": {"won": 0.7}})
    assert answer.status_code == 200
    moved = answer.json()
    assert {**moved, "status": 201} == {**other, "current": True, "evaluation": {"won": 0.7}}
    assert (await api.open("d", policy="walker"))["policy_version"] == other["policy_version"]


async def test_the_list_says_which_name_points_where_and_where_versions_come_from(api: Served):
    first = await load(api, evaluation={"completion": {"rate": 0.5}})
    second = await load(api, path="two", parent=first["version"])
    await load(api, "beside", alias=False)
    listed = (await api.client.get("/policy")).json()
    base, walker = listed["policies"]
    assert (base["version"], base["previous"]) == (None, None)
    assert (walker["version"], walker["previous"]) == (second["version"], first["version"])
    assert walker["policy_version"] == second["policy_version"]
    shown = {one["version"]: one for one in listed["versions"]}
    assert [one["name"] for one in listed["versions"]] == ["beside", "walker", "walker"]
    assert shown[first["version"]]["evaluation"] == {"completion": {"rate": 0.5}}
    assert shown[second["version"]]["parent"] == first["version"]
    assert [one["current"] for one in listed["versions"]] == [False, False, True]


async def test_a_rollback_moves_the_name_and_no_open_episode(api: Served):
    first, second = await load(api), await load(api, path="two")
    await api.open(policy="walker", action_space=DISCRETE)
    answer = await api.client.post("/policy/walker/rollback")
    assert (answer.status_code, answer.json()["version"]) == (200, first["version"])
    assert (await api.act())["policy_version"] == second["policy_version"]
    assert (await api.open("new", policy="walker"))["policy_version"] == first["policy_version"]
    refused = await api.client.post("/policy/walker/rollback")
    assert (refused.status_code, refused.json()["code"]) == (409, "no_previous_version")
    for name in ("none", "scripted"):
        missing = await api.client.post(f"/policy/{name}/rollback")
        assert (missing.status_code, missing.json()["code"]) == (404, "policy_not_found")


async def test_another_name_can_point_to_the_same_files(api: Served):
    first = await load(api)
    answer = await api.client.put("/policy/production", json={"version": first["version"], "parent": first["version"]})
    assert answer.status_code == 201
    assert answer.json()["version"] == "production@" + first["digest"][:12]
    assert answer.json()["policy_version"] == first["policy_version"]
    await api.client.delete("/policy/walker")
    assert (await api.open(policy="production"))["policy_version"] == first["policy_version"]
    assert {name: adapter.name for name, adapter in api.engine.names.items()} == {
        "production": answer.json()["version"]
    }


async def test_two_versions_in_the_engine_have_two_names(api: Served):
    await load(api)
    await load(api, path="two")
    assert len({adapter.name for adapter in api.engine.adapters}) == 2, "vLLM tells adapters of a batch apart by name"
    assert [adapter.name for adapter in api.engine.names.values()] == [api.engine.adapters[1].name]


async def test_the_same_files_again_change_nothing(api: Served):
    first = await load(api)
    again = await load(api)
    assert {**again, "status": 201} == first


async def test_adapters_and_pins_are_there_after_a_restart(api: Served, tmp_path: Path, tokenizer: HFTokenizer):
    old = await load(api)
    await api.open("old", policy="walker", action_space=DISCRETE)
    version = (await load(api, path="two"))["policy_version"]
    await load(api, "gone")
    await api.client.delete("/policy/gone")
    await api.open(policy="walker", action_space=DISCRETE)
    make_adapter(tmp_path / "adapters-in" / "two", 9)
    async with serve(tmp_path, engine(tokenizer), adapters=tmp_path / "adapters-in") as second:
        assert await names(second) == ["scripted", "walker"]
        assert len(second.engine.adapters) == 1, "a version that no name points to was loaded at once"
        assert (await second.act())["policy_version"] == version, "the changed folder was loaded instead of the copy"
        assert (await second.act("old"))["policy_version"] == old["policy_version"]
        assert len(second.engine.adapters) == 2
        assert (await second.client.post("/policy/walker/rollback")).json()["version"] == old["version"]
    without = ScriptedEngine(tokenizer)
    async with serve(tmp_path, without) as off:
        assert await names(off) == ["scripted"]
        assert (await off.post_act(observation="on")).json()["code"] == "engine_unavailable"


async def test_a_second_replica_serves_what_the_first_loaded(api: Served, tmp_path: Path, tokenizer: HFTokenizer):
    first = await load(api)
    async with serve(tmp_path, engine(tokenizer)) as other:
        await api.open(policy="walker", action_space=DISCRETE)
        assert (await other.act())["policy_version"] == first["policy_version"]
        second = await load(api, path="two")
        beside = await load(api, path="two", name="beside", alias=False)
        opened = await other.open("b", policy=beside["version"], action_space=DISCRETE)
        assert opened["policy_version"] == second["policy_version"], "an unknown version is looked up in the store"
        policies = other.app.state.services.sessions.agent.policies
        await until(lambda: policies.catalog.aliases.get("walker") == second["digest"])
        assert (await other.open("new", policy="walker"))["policy_version"] == second["policy_version"]
        assert (await other.act(observation="on"))["policy_version"] == first["policy_version"]


async def test_a_replica_without_the_files_says_so_until_it_gets_them(
    api: Served, tmp_path: Path, tokenizer: HFTokenizer
):
    first = await load(api)
    await api.open(policy="walker", action_space=DISCRETE)
    elsewhere, source = tmp_path / "elsewhere", tmp_path / "adapters-in"
    shared = SQLStore(api.store_url)
    async with serve(elsewhere, engine(tokenizer), store=shared, adapters=source) as other:
        assert await names(other) == ["scripted"]
        for refused in (await other.post_act(), await other.client.post("/episode", json={"policy": "walker"})):
            assert (refused.status_code, refused.json()["code"]) == (503, "engine_unavailable")
            assert "shared folder" in refused.json()["detail"]
            assert str(tmp_path) not in refused.text
        assert (await load(other))["status"] == 200
        assert await names(other) == ["scripted", "walker"]
        assert (await other.act())["policy_version"] == first["policy_version"]


async def test_an_episode_of_an_older_release_keeps_its_version_if_it_is_known(api: Served):
    first = await load(api)
    await api.open("known", policy="walker", action_space=DISCRETE)
    await api.open("lost", policy="walker", action_space=DISCRETE)
    second = await load(api, path="two")
    await execute(api.store_url, "UPDATE episodes SET policy_digest = NULL")
    await execute(api.store_url, "UPDATE episodes SET policy_version = 'gone' WHERE episode_id = 'lost'")
    for name in ("known", "lost"):
        api.app.state.services.sessions.forget(name)
    assert (await api.act("known"))["policy_version"] == first["policy_version"]
    assert (await api.act("lost"))["policy_version"] == second["policy_version"]


async def test_a_fork_acts_with_the_version_of_its_parent(api: Served):
    first = await load(api)
    await api.open(policy="walker", action_space=DISCRETE)
    await load(api, path="two")
    await api.client.post("/episode/e/fork", json={"episode_ids": ["f"]})
    assert (await api.act("f"))["policy_version"] == first["policy_version"]
    api.app.state.services.sessions.forget("f")
    assert (await api.act("f", observation="on"))["policy_version"] == first["policy_version"]


async def test_the_default_policy_is_chosen_by_the_setting_and_then_by_the_call(
    api: Served, tmp_path: Path, tokenizer: HFTokenizer
):
    async def choose(policy: str | None) -> str:
        return (await api.client.put("/policy-default", json={"policy": policy})).json()["default"]

    first = await load(api)
    assert (await api.open("a"))["policy"] == "scripted"
    async with serve(tmp_path, engine(tokenizer), default_policy="walker") as other:
        assert (await other.client.get("/policy")).json()["default"] == "walker"
        opened = await other.open("b")
        assert (opened["policy"], opened["policy_version"]) == ("walker", first["policy_version"])
        assert (await other.client.delete("/policy/walker")).json()["code"] == "policy_in_use"
        second = await load(api, path="two", alias=False)
        assert await choose(second["version"]) == second["version"]
        policies = other.app.state.services.sessions.agent.policies
        await until(lambda: policies.default == second["version"])
        opened = await other.open("c")
        assert (opened["policy"], opened["policy_version"]) == (second["version"], second["policy_version"])
        assert (await other.open("d", policy="scripted"))["policy_version"] == "scripted-1"
        assert await choose("scripted") == "scripted"
        await until(lambda: policies.default == "scripted")
        assert (await other.open("f"))["policy"] == "scripted"
        assert await choose(None) == "scripted"
        await until(lambda: policies.default == "walker")


async def test_only_an_existing_policy_can_be_the_default(api: Served, tmp_path: Path, tokenizer: HFTokenizer):
    for body in ({"policy": "none"}, {"policy": ""}, {}, {"policy": "scripted", "alias": True}):
        assert (await api.client.put("/policy-default", json=body)).status_code == 422
    async with serve(tmp_path, engine(tokenizer), default_policy="walker") as early:
        refused = await early.client.post("/episode", json={})
        assert (refused.status_code, refused.json()["code"]) == (503, "engine_unavailable")
        assert "walker" in refused.json()["detail"]
        await load(api)
        assert (await early.open())["policy"] == "walker"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "path, version"),
        ({"path": "one", "version": "walker@00000000"}, "path, version"),
        ({"version": "walker"}, "NAME@DIGEST"),
        ({"version": "walker@0000000"}, "no policy"),
        ({"version": "walker@" + "0" * 64}, "no policy"),
        ({"path": "one", "parent": "walker"}, "parent"),
        ({"path": "one", "round": -1}, "round"),
        ({"path": "one", "evaluation": {"text": "x" * (16 << 10)}}, "16384"),
        ({"path": "one", "evaluation": []}, "evaluation"),
        ({"path": "one", "alias": None}, "alias"),
    ],
)
async def test_an_invalid_request_loads_nothing(api: Served, body: dict[str, Any], word: str):
    refused = await api.client.put("/policy/walker", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert word in refused.json()["detail"]
    assert (await api.client.get("/policy")).json()["versions"] == []


async def test_only_a_unique_digest_of_8_characters_names_a_version(api: Served):
    first = await load(api)
    store = api.app.state.services.sessions.store
    twin = replace((await store.catalog()).versions[0], digest=first["digest"][:10] + "x" * 54)
    await store.put_version(twin, move_alias=False)
    for name, word in (
        ("walker@" + first["digest"][:7], "no policy"),
        ("walker@" + first["digest"][:8], "several versions"),
        ("nobody@" + first["digest"], "no policy"),
        ("walker@", "no policy"),
        ("@" + first["digest"], "no policy"),
    ):
        refused = await api.client.post("/episode", json={"policy": name})
        assert (refused.status_code, word in refused.json()["detail"]) == (422, True), (name, refused.text)
    assert (await api.open(policy="walker@" + first["digest"][:11]))["policy_version"] == first["policy_version"]


async def test_what_never_changes_cannot_be_followed(api: Served):
    first = await load(api)
    refused = await api.client.post("/episode", json={"policy": first["version"], "policy_updates": "follow"})
    assert refused.status_code == 422
    assert "policy_updates" in refused.text
    assert (await api.open(policy_updates="follow"))["policy"] == "scripted"


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
    listed = (await api.client.get("/policy")).json()
    assert [policy["policy_version"] for policy in listed["policies"]] == ["scripted-1", version]
    assert len(listed["versions"]) == 1


async def test_what_is_not_there_cannot_be_removed_or_chosen(api: Served):
    answer = await api.client.delete("/policy/none")
    assert (answer.status_code, answer.json()["code"]) == (404, "policy_not_found")
    assert (await api.client.delete("/policy/scripted")).status_code == 422
    assert (await api.client.post("/episode", json={"policy": "none"})).status_code == 422


async def test_adapters_are_off_unless_a_folder_is_named(tmp_path: Path, tokenizer: HFTokenizer):
    for served in (engine(tokenizer), ScriptedEngine(tokenizer)):
        async with serve(tmp_path, served) as api:
            answer = await api.client.put("/policy/walker", json={"path": "one"})
            assert answer.status_code == 422
            assert "EPISODIC_ADAPTERS" in answer.json()["detail"]


async def test_an_adapter_that_could_not_be_kept_is_not_served(api: Served, monkeypatch: pytest.MonkeyPatch):
    await load(api)
    store = api.app.state.services.sessions.store
    with monkeypatch.context() as broken:

        async def fail(*_: Any, **__: Any) -> None:
            raise StoreUnavailable("down")

        broken.setattr(store, "put_version", fail)
        refused = await api.client.put("/policy/walker", json={"path": "two"})
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
    assert len(api.engine.adapters) == 1, "the new adapter is still loaded"
    assert (await load(api))["status"] == 200
    again = await load(api, path="two")
    assert (await store.catalog()).aliases == {"walker": again["digest"]}


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


async def test_the_purge_removes_unused_versions_and_their_files(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(3, 6):
        make_adapter(tmp_path / "adapters-in" / str(number), number)
    monkeypatch.setattr("service.cli.store.FORGET_S", 0.0)
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))
    monkeypatch.setenv("EPISODIC_STORE", api.store_url)
    current, active = await load(api), await load(api, "active", "two")
    await api.client.delete("/policy/active")
    await api.open(policy=active["version"], action_space=DISCRETE)
    unused, twin = await load(api, path="3", alias=False), await load(api, path="4", alias=False)
    await load(api, "twin", "4")

    async def purge() -> str:
        ran = await asyncio.to_thread(CliRunner().invoke, cli, ["purge", "--only-versions"])
        assert ran.exit_code == 0, ran.output
        return ran.output

    def files() -> set[str]:
        return {path.name for path in (tmp_path / "adapters").iterdir()}

    said = await purge()
    assert said.startswith("Removed 2 unused versions of adapters: ")
    assert unused["version"] in said
    assert twin["version"] in said
    assert files() == {current["digest"], active["digest"], twin["digest"]}, "another name has the files of `twin`"
    assert (await api.act())["policy_version"] == active["policy_version"]
    await until(lambda: len(api.engine.adapters) == 3)  # this replica has forgotten the removed ones
    assert (await api.client.post("/episode", json={"policy": unused["version"]})).status_code == 422
    await api.client.post("/episode/e/end", json={})
    assert active["version"] in await purge()
    assert files() == {current["digest"], twin["digest"]}
    assert await purge() == "Removed 0 unused versions of adapters.\n"
    assert (await load(api, path="3", alias=False))["status"] == 201, "a removed version can be loaded again"
