"""GET /evaluation: groups, comparisons, warnings, Markdown, and what is refused."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.access.keys import new_key
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.adapters import make_adapter
from tests.support.serving import DISCRETE, Served, serve

names = map("e{}".format, itertools.count())


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    engine = ScriptedEngine(tokenizer, reply=lambda _: "{")
    engine.info = dataclasses.replace(engine.info, max_lora_rank=8)
    make_adapter(tmp_path / "adapters" / "one", 1)
    async with serve(tmp_path, engine, adapters=tmp_path / "adapters") as served:
        yield served


async def end(api: Served, name: str, success: bool | None, reward: float = 0.0) -> None:
    outcome = {} if success is None else {"success": success}
    ended = await api.client.post(f"/episode/{name}/end", json={"terminated": True, "reward": reward, **outcome})
    assert ended.status_code == 200, ended.text


async def played(
    api: Served, group: str | None, success: bool | None, reward: float = 0.0, seed: Any = None, **fields: Any
) -> str:
    """Opens and ends an episode of a group, and returns its id."""
    name = next(names)
    metadata = {"env": "lake"} | ({} if seed is None else {"seed": seed})
    await api.open(name, **({} if group is None else {"group": group}), **{"metadata": metadata, **fields})
    await end(api, name, success, reward)
    return name


async def play_seeds(api: Served, group: str, successes: Any, seeds: Any = None, **fields: Any) -> None:
    """Plays seeds 0, 1, ... with these successes, and returns that are 1 for a success."""
    for seed, success in zip(seeds or itertools.count(), successes, strict=False):
        await played(api, group, success, float(success), seed, **fields)


async def evaluation(api: Served, **params: Any) -> dict[str, Any]:
    answer = await api.client.get("/evaluation", params={"by": "group", **params})
    assert answer.status_code == 200, answer.text
    return answer.json()


def codes(report: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in report["warnings"]}


async def test_a_group_is_summarized(api: Served):
    for seed, (success, reward) in enumerate([(True, 3.0), (True, 2.0), (False, -1.0), (None, 8.0)]):
        await played(api, "g", success, reward, seed)
    await api.open("active", group="g")
    await api.open("aborted", group="g")
    assert (await api.client.post("/episode/aborted/end", json={"reward": 9.0})).status_code == 200
    deleted = await played(api, "g", True, 100.0)
    assert (await api.client.delete(f"/episode/{deleted}")).status_code == 204
    report = await evaluation(api)
    (group,) = report["groups"]
    assert (report["by"], report["level"], report["comparisons"]) == ("group", 0.95, [])
    assert (group["value"], group["episodes"], group["ended"]) == ("g", 6, 5)
    assert group["excluded"] == {"active": 1, "aborted": 1, "unscored": 1}
    assert (group["completion"]["rate"], group["completion"]["n"]) == (pytest.approx(2 / 3), 3)
    assert group["completion"]["low"] == pytest.approx(0.2077, abs=1e-4)  # Wilson's interval of 2 in 3
    assert (group["return"]["mean"], group["return"]["n"]) == (3.0, 4)
    assert (group["return"]["min"], group["return"]["max"], group["return"]["iqm"]) == (-1.0, 8.0, 2.5)
    assert group["length"] == {"mean": 0.0, "p50": 0.0, "p95": 0.0}
    assert group["tokens"] == {"total": 0, "mean": 0.0}
    assert group["human"] == {"mean": None, "low": None, "high": None, "n": 0, "raters": 0, "alpha": None}
    assert (group["pass_at"], group["pass_all"], group["parse_failures"]) == (None, None, 0)
    assert codes(report) == {"few_episodes"}


async def test_acts_count_with_their_tokens_failures_and_durations(api: Served):
    space = {"type": "json", "schema": {"type": "integer"}}
    await api.open("failing", group="g", action_space=space)
    for _ in range(3):
        assert (await api.act("failing"))["parse_failure"]["kind"] == "json"
    await api.open("recorded", group="g", action_space=DISCRETE)
    await api.act("recorded")
    recorded = await api.client.post("/episode/recorded/action", json={"observation": "look", "action": "left"})
    assert recorded.status_code == 200
    for name in ("failing", "recorded"):
        await end(api, name, True)
    report = await evaluation(api)
    (group,) = report["groups"]
    assert (group["parse_failures"], group["length"]) == (3, {"mean": 2.5, "p50": 2.0, "p95": 3.0})
    assert group["tokens"]["total"] == sum([(await api.get(name))["num_tokens"] for name in ("failing", "recorded")])
    assert group["act_seconds"]["p99"] >= group["act_seconds"]["p50"] > 0
    assert "recorded_actions" in codes(report)


async def test_groups_are_compared_with_the_baseline_on_the_same_seeds(api: Served):
    await play_seeds(api, "base", [False] * 20)
    await play_seeds(api, "better", [True] * 20)
    await play_seeds(api, "same", [False] * 20)
    await play_seeds(api, "elsewhere", [True] * 20, range(100, 120))
    report = await evaluation(api, baseline="base")
    found = {(one["a"], one["metric"]): one for one in report["comparisons"]}
    assert found.keys() == set(itertools.product(["better", "same", "elsewhere"], ["completion", "return"]))
    assert {one["b"] for one in found.values()} == {"base"}
    verdicts = {key: (one["pairs"], one["verdict"]) for key, one in found.items()}
    assert verdicts["better", "completion"] == verdicts["better", "return"] == (20, "better")
    assert verdicts["same", "completion"] == verdicts["same", "return"] == (20, "tied")
    assert verdicts["elsewhere", "completion"] == (0, "better")
    better = found["better", "completion"]
    assert (better["delta"], better["method"], better["p"]) == (1.0, "mcnemar_exact", pytest.approx(2 * 0.5**20))
    assert better["p_adjusted"] > better["p"]
    (unpaired,) = [warning for warning in report["warnings"] if warning["code"] == "unpaired"]
    assert "'elsewhere'" in unpaired["detail"]
    assert "'better'" not in unpaired["detail"]
    worse = await evaluation(api, baseline="better", metric="return")
    assert {one["metric"] for one in worse["comparisons"]} == {"return"}
    assert ("base", "worse") in {(one["a"], one["verdict"]) for one in worse["comparisons"]}


async def test_three_episodes_are_too_few_for_a_verdict(api: Served):
    await play_seeds(api, "a", [True] * 3)
    await play_seeds(api, "b", [False] * 3)
    report = await evaluation(api, baseline="b")
    assert [one["verdict"] for one in report["comparisons"]] == ["too_few", "too_few"]
    assert "few_episodes" in codes(report)


async def test_an_unknown_success_is_never_a_failure(api: Served):
    for seed in range(12):
        await played(api, "a", None, 1.0, seed)
        await played(api, "b", None, 0.0, seed)
    report = await evaluation(api, baseline="b")
    for group in report["groups"]:
        assert group["completion"] == {"rate": None, "low": None, "high": None, "n": 0}
        assert (group["excluded"], group["return"]["n"]) == ({"unscored": 12}, 12)
    completion, returns = report["comparisons"]
    assert (completion["verdict"], completion["pairs"], completion["delta"]) == ("too_few", 0, None)
    assert returns["verdict"] == "better"
    assert "unpaired" not in codes(report)


async def test_forks_of_one_episode_are_one_cluster(api: Served):
    await api.open("root", group="g", action_space=DISCRETE)
    await api.act("root")
    answer = await api.client.post("/episode/root/fork", json={"n": 8})
    forks = [fork["episode_id"] for fork in answer.json()["episodes"]]
    await api.act(forks[0])
    deeper = (await api.client.post(f"/episode/{forks[0]}/fork", json={"n": 1})).json()["episodes"]
    family = ["root", *forks, *(fork["episode_id"] for fork in deeper)]
    for name in family:
        await end(api, name, True)
    (group,) = (await evaluation(api))["groups"]
    await played(api, "one", True)
    one, whole = (await evaluation(api))["groups"][::-1]
    assert (whole["completion"]["n"], one["completion"]["n"]) == (10, 1)
    assert whole["completion"]["low"] == pytest.approx(one["completion"]["low"])
    assert group["return"]["low"] is None, "one cluster has no interval"
    await api.client.delete("/episode/root")
    (again,) = (await evaluation(api, group="g"))["groups"]
    assert again["completion"]["low"] == pytest.approx(one["completion"]["low"])


async def test_plays_of_one_seed_are_averaged_and_give_pass_at_k(api: Served):
    for seed in range(12):
        for number in range(4):
            await played(api, "often", number == 0, float(number == 0), seed)
        await played(api, "once", False, 0.0, seed)
    report = await evaluation(api, baseline="once")
    often, once = report["groups"]
    assert often["pass_at"] == {"1": pytest.approx(0.25), "4": 1.0}
    assert often["pass_all"] == {"4": 0.0}
    assert (once["pass_at"], once["pass_all"]) == (None, None)
    assert {one["pairs"] for one in report["comparisons"]} == {12}
    assert {one["delta"] for one in report["comparisons"]} == {0.25}
    assert "averaged_plays" in codes(report)


async def test_an_episode_counts_in_each_of_its_tags(api: Served):
    await played(api, None, True, tags=["x", "y"])
    await played(api, None, False, tags=["y", "y"])
    await played(api, None, True)
    report = await evaluation(api, by="tag", baseline="y")
    assert [(group["value"], group["episodes"]) for group in report["groups"]] == [("x", 1), ("y", 2), (None, 1)]
    assert {one["a"] for one in report["comparisons"]} == {"x", None}
    (shared,) = [warning for warning in report["warnings"] if warning["code"] == "shared_episodes"]
    assert shared["detail"].endswith("Groups: 'x'.")


@pytest.mark.parametrize("by", ["policy", "policy_version", "profile", "env"])
async def test_episodes_are_grouped_by_each_label(api: Served, by: str):
    loaded = await api.client.put("/policy/walker", json={"path": "one"})
    assert loaded.status_code == 201, loaded.text
    versions = {policy["policy_version"] for policy in (await api.client.get("/policy")).json()["policies"]}
    await played(api, None, True, policy="walker", profile="code", metadata={"env": "lake"})
    await played(api, None, True, metadata={"env": "taxi"})
    await played(api, None, True, metadata={})
    wanted = {
        "policy": {"scripted": 2, "walker": 1},
        "policy_version": dict.fromkeys(versions, 1) | {"scripted-1": 2},
        "profile": {"code": 1, None: 2},
        "env": {"lake": 1, "taxi": 1, None: 1},
    }
    report = await evaluation(api, by=by)
    assert {group["value"]: group["episodes"] for group in report["groups"]} == wanted[by]


async def test_filters_select_the_episodes(api: Served):
    await played(api, "a", True, tags=["x"])
    await played(api, "a", False, tags=["y"])
    await played(api, "b", True, metadata={"env": "taxi", "level": 3})
    for where, found in (
        ({"group": "a"}, {"a": 2}),
        ({"tag": "x"}, {"a": 1}),
        ({"success": "true"}, {"a": 1, "b": 1}),
        ({"env": "taxi"}, {"b": 1}),
        ({"metadata.level": "3"}, {"b": 1}),
        ({"status": "active"}, {}),
        ({"until": "2020-01-01"}, {}),
        ({"policy": "scripted", "group": "b"}, {"b": 1}),
        ({"group": "a\0"}, {}),
    ):
        report = await evaluation(api, **where)
        assert {group["value"]: group["episodes"] for group in report["groups"]} == found, where
    assert codes(await evaluation(api, env="taxi")) == {"few_episodes"}


async def test_an_empty_selection_is_an_answer(api: Served):
    report = await evaluation(api, baseline="a")
    assert (report["groups"], report["comparisons"]) == ([], [])
    assert codes(report) == {"no_episodes"}


async def test_what_is_wrong_is_refused_by_name(api: Served):
    await played(api, "a", True)
    await played(api, "b", True)
    cases: list[tuple[dict[str, str], str]] = [
        ({"baseline": "c"}, "no selected episode has 'c' as its group. The values are: 'a', 'b'."),
        ({"baseline": "c\0|"}, "'c\\x00|'"),
        ({"level": "0"}, "greater than 0"),
        ({"level": "1"}, "less than 1"),
        ({"level": "nan"}, "less than 1"),
        ({"level": "x"}, "number"),
        ({"by": "seed"}, "policy"),
        ({"metric": "length"}, "completion"),
        ({"limit": "3"}, "unknown parameter"),
        ({"success": "maybe"}, "boolean"),
    ]
    for params, detail in cases:
        refused = await api.client.get("/evaluation", params={"by": "group", **params})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request"), params
        assert refused.json()["errors"][0]["loc"] == ["query", *params], params
        assert detail in refused.json()["detail"], params


async def test_ratings_of_whole_episodes_count(api: Served):
    rated = [await played(api, "g", True) for _ in range(2)]
    for name, ann, bob in zip(rated, (1, 5), (2, 4), strict=True):
        for rater, rating in (("ann", ann), ("bob", bob)):
            await api.client.post(f"/episode/{name}/feedback", json={"rating": rating, "rater": rater})
    unrated = await played(api, "g", True)
    await api.open("stepped", group="g", action_space=DISCRETE)
    await api.act("stepped")
    await api.client.post("/episode/stepped/feedback", json={"rating": 1, "step": 0, "rater": "cy"})
    report = await evaluation(api)
    human = report["groups"][0]["human"]
    assert (human["mean"], human["n"], human["raters"]) == (3.0, 2, 2)
    assert human["alpha"] == pytest.approx(0.85)
    assert "one_rater" not in codes(report)
    await api.client.post(f"/episode/{unrated}/feedback", json={"rating": 3})
    human = (await evaluation(api))["groups"][0]["human"]
    assert (human["n"], human["raters"], human["alpha"]) == (3, 2, pytest.approx(0.85))


async def test_markdown_shows_hostile_labels_as_text(api: Served):
    labels = ["a|b", "`x` **bold** <img src=x> [a](http://b) \\| @everyone #1", "new\nline", "x" * 128]
    for label in labels:
        await play_seeds(api, label, [True] * 3)
    answer = await api.client.get(
        "/evaluation", params={"by": "group", "baseline": "a|b"}, headers={"Accept": "text/markdown"}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/markdown; charset=utf-8")
    text = answer.text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for table in (rows[: 2 + len(labels)], rows[2 + len(labels) :]):
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1, text
    assert "a\\|b" in text
    assert "<img" not in text.replace("\\<", "")
    assert "**too few**" in text
    assert "- `few_episodes`: " in text
    assert "@everyone" not in text
    empty = await api.client.get("/evaluation?tag=nothing", headers={"Accept": "text/markdown"})
    assert empty.text == "### Evaluation by policy\n\n- `no_episodes`: No episodes match the filters.\n"


async def test_returns_near_the_largest_float_make_no_invalid_json(api: Served):
    for seed in range(12):
        await played(api, "huge", True, (-1) ** seed * 1.7e308, seed)
        await played(api, "small", True, 1.0, seed)
    report = await evaluation(api, baseline="small")
    assert report["groups"][0]["return"]["max"] == 1.7e308
    markdown = await api.client.get("/evaluation?by=group&baseline=small", headers={"Accept": "text/markdown"})
    assert markdown.status_code == 200


async def test_the_same_data_has_the_same_answer(api: Served):
    for seed in range(20):
        await played(api, f"g{seed % 2}", seed % 3 == 0, float(seed % 7), seed // 2)
    answers = await asyncio.gather(*(api.client.get("/evaluation?by=group&baseline=g0") for _ in range(3)))
    assert len({answer.content for answer in answers}) == 1


async def test_a_tenant_evaluates_only_its_own_episodes(api: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.access.keys.FRESH_S", 0.0)
    store = api.app.state.services.sessions.store
    for tenant in ("acme", "other"):
        key, record = new_key(tenant, ("act", "read"), 1.0)
        await store.add_key(record)
        api.client.headers["Authorization"] = f"Bearer {key}"
        assert (await evaluation(api))["groups"] == []
        await played(api, f"of {tenant}", True)
        report = await evaluation(api)
        assert [group["value"] for group in report["groups"]] == [f"of {tenant}"]
