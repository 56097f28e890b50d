"""Filters, order and pages of lists: through HTTP, both clients and the command line."""

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from episodic import AsyncClient, Client
from service.engine.tokenizer import HFTokenizer
from service.filters import MAX_KEY, MAX_TEXT, ORDERS, SORTS
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


async def names(api: Served, **params: Any) -> list[str]:
    answer = await api.client.get("/episode", params=params)
    assert answer.status_code == 200, answer.text
    return [episode["episode_id"] for episode in answer.json()["episodes"]]


async def test_episodes_are_selected_by_metadata(api: Served):
    values: dict[str, Any] = {
        "text": "lake",
        "number": 7,
        "digits": "7",
        "float": 0.5,
        "flag": True,
        "empty": "",
        "null": None,
        "list": [7],
        "unicode": "Zürich + & = %",
    }
    for name, value in values.items():
        await api.open(name, metadata={"a key.with:dots": value, "other": "lake"})
    await api.open("without")
    cases = {
        "lake": ["text"],
        "7": ["digits", "number"],
        "0.5": ["float"],
        "true": ["flag"],
        "": ["empty"],
        "null": ["null"],
        "[7]": [],
        "True": [],
        "Zürich + & = %": ["unicode"],
        "a\0b": [],
    }
    for text, found in cases.items():
        assert await names(api, **{"metadata.a key.with:dots": text}) == found, text
    assert await names(api, **{"metadata.other": "lake", "metadata.a key.with:dots": "lake"}) == ["text"]
    assert await names(api, **{"metadata.'; --": "x"}) == []


@pytest.mark.parametrize(("key", "value"), [("k" * (MAX_KEY + 1), "v"), ("k", "v" * (MAX_TEXT + 1))])
async def test_metadata_that_is_too_long_to_filter_by_is_kept_and_refused_as_filter(api: Served, key: str, value: str):
    opened = await api.open("long", metadata={key: value, "env": "x\0y", "short": "s"})
    assert opened["metadata"][key] == value
    assert await names(api, **{"metadata.short": "s"}) == ["long"]
    refused = await api.client.get("/episode", params={f"metadata.{key}": value})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


async def test_episodes_are_selected_by_env_and_success(api: Served):
    for name, env, success in (("a", "lake", True), ("b", "lake", False), ("c", "taxi", True), ("d", "lake", None)):
        await api.open(name, metadata={"env": env, "seed": 3})
        fields = {} if success is None else {"success": success}
        await api.client.post(f"/episode/{name}/end", json={"terminated": True, **fields})
    await api.open("active", metadata={"env": "lake"})
    await api.open("none", metadata={"env": None})
    assert await names(api, env="lake") == ["active", "d", "b", "a"]
    assert await names(api, env="lake", success="true") == ["a"]
    assert await names(api, success="false") == ["b"]
    assert await names(api, env="null") == []
    exported = await api.client.get("/export", params={"env": "lake", "success": "true"})
    assert [json.loads(line)["episode"]["episode_id"] for line in exported.text.splitlines()] == ["a"]


async def test_episodes_are_selected_by_time(api: Served):
    at = [(await api.open(name))["created_at"] for name in ("a", "b", "c")]
    iso = [datetime.fromtimestamp(seconds, UTC).isoformat() for seconds in at]
    for since, until in ((at[1], at[2]), (repr(at[1]), iso[2].replace("+00:00", "Z"))):
        assert await names(api, since=since) == ["c", "b"]
        assert await names(api, until=until) == ["b", "a"]
        assert await names(api, since=since, until=until) == ["b"]
    assert await names(api, since=iso[0].replace("+00:00", "")) != [], "UTC is the default"
    unescaped = await api.client.get(f"/episode?since={iso[0]}")  # the + arrives as a space
    assert unescaped.status_code == 200, unescaped.text
    assert await names(api, since="2020-01-01") == ["c", "b", "a"]
    assert await names(api, until="2020-01-01T10:00:00-05:00") == []


@pytest.mark.parametrize("text", ["", "yesterday", "nan", "inf", "2026-13-01", "1e999", "0001-01-01T00:00:00+14:00x"])
async def test_a_text_that_is_no_time_is_refused_by_name(api: Served, text: str):
    refused = await api.client.get("/episode", params={"since": text})
    assert refused.status_code == 422, refused.text
    assert refused.json()["errors"][0]["loc"] == ["query", "since"]


async def rated(api: Served) -> dict[str, dict[str, float]]:
    """Opens episodes with equal returns, lengths and ratings, and some without a rating."""
    shapes = [(0, 0.0, None), (2, 1.5, 4), (2, -2.0, 4), (1, 1.5, None), (2, 1.5, 2), (3, 1e6, 5), (1, -0.0, None)]
    values: dict[str, dict[str, float]] = {}
    for number, (length, reward, rating) in enumerate(shapes):
        name = f"e{number}"
        opened = await api.open(name)
        for step in range(length):
            await api.act(name, reward=reward / length if step == 0 else None)
        await api.client.post(f"/episode/{name}/end", json={"reward": reward - reward / max(length, 1)})
        if rating is not None:
            for one in (rating - 1, rating):
                await api.client.post(f"/episode/{name}/feedback", json={"rating": one})
        ended = await api.get(name)
        values[name] = {"created": opened["created_at"], "return": ended["episode_return"], "length": length}
        if rating is not None:
            values[name]["rating"] = rating - 0.5
    return values


@pytest.mark.parametrize(("sort", "order"), list(itertools.product(SORTS, ("asc", "desc"))))
async def test_pages_of_every_order_are_complete_and_sorted(api: Served, sort: str, order: str):
    values = await rated(api)
    missing = -1.0 if order == "desc" else 9.0

    def key(name: str) -> tuple[float, float]:
        return values[name].get(sort, missing), values[name]["created"]

    wanted = sorted(values, key=key, reverse=order == "desc")
    for limit in range(1, 9):
        found: list[str] = []
        query: dict[str, Any] = {"sort": sort, "order": order, "limit": limit}
        num_pages = 0
        while True:
            page = (await api.client.get("/episode", params=query)).json()
            found += [episode["episode_id"] for episode in page["episodes"]]
            num_pages += 1
            if page["next_cursor"] is None:
                break
            query["cursor"] = page["next_cursor"]
        assert found == wanted, limit
        assert num_pages == -(-len(wanted) // limit), "an exactly full last page has no next one"


async def test_the_cursor_of_another_order_is_refused(api: Served):
    for number in range(3):
        await api.open(f"e{number}")
    orders = list(itertools.product(SORTS, ("asc", "desc")))
    cursors = {}
    for sort, order in orders:
        page = await api.client.get("/episode", params={"sort": sort, "order": order, "limit": 1})
        cursors[sort, order] = page.json()["next_cursor"]
    for made, used in itertools.product(orders, orders):
        query = {"sort": used[0], "order": used[1], "cursor": cursors[made]}
        answer = await api.client.get("/episode", params=query)
        assert answer.status_code == (200 if made == used else 422), (made, used)
    default = await api.client.get("/episode", params={"cursor": cursors["created", "desc"]})
    assert default.status_code == 200
    assert len(default.json()["episodes"]) == 2


async def test_clients_and_command_line_pass_every_filter_on(api: Served):
    for name, seed in (("a", 1), ("b", 2), ("c", 2)):
        await api.open(name, metadata={"env": "lake", "seed": seed, "eval": True})
        await api.client.post(f"/episode/{name}/end", json={"terminated": True, "success": True})
    now = datetime.now(UTC)
    where: Any = {
        "env": "lake",
        "success": True,
        "since": datetime(2020, 1, 1, tzinfo=UTC),
        "until": now.timestamp() + 100,
        "metadata": {"seed": 2, "eval": True},
    }
    async with AsyncClient(api.url) as client:
        assert [one.episode_id async for one in client.episodes(**where, sort="created", order="asc")] == ["b", "c"]
        assert [one["episode"]["episode_id"] async for one in client.export(**where)] == ["c", "b"]

    def blocking() -> list[str]:
        with Client(api.url) as client:
            return [one.episode_id for one in client.episodes(**where)]

    assert await asyncio.to_thread(blocking) == ["c", "b"]
    options = ["--env", "lake", "--success", "--since", "2020-01-01", "--metadata", "seed=2", "--metadata", "eval=true"]
    for command, more in (("episodes", ["--json", "--order", "asc"]), ("export", [])):
        called = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", command, "--url", api.url, *options, *more),
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await called.communicate()
        lines = [json.loads(line) for line in printed.splitlines()]
        found = [line.get("episode_id") or line["episode"]["episode_id"] for line in lines]
        assert found == (["b", "c"] if command == "episodes" else ["c", "b"])


async def test_the_openapi_document_describes_filters_and_order(api: Served):
    document = (await api.client.get("/openapi.json")).json()
    listed = {one["name"]: one for one in document["paths"]["/episode"]["get"]["parameters"]}
    exported = {one["name"] for one in document["paths"]["/export"]["get"]["parameters"]}
    assert {"env", "success", "since", "until", "metadata.KEY"} <= listed.keys() & exported
    assert ORDERS.keys() <= listed.keys() - exported


# --- pages of a trajectory


async def test_a_trajectory_is_read_page_by_page(api: Served):
    await api.open(instructions="Play.")
    for step in range(7):
        await api.act(observation=f"o{step}", reward=float(step), info={"n": step})
    for step in (None, 2, 6):
        await api.client.post(f"{api.path}/feedback", json={"rating": 3, **({} if step is None else {"step": step})})
    await api.client.post(f"{api.path}/end", json={"reward": 7.0, "terminated": True})
    whole = await api.trajectory()
    for limit in (1, 3, 7, 100):
        steps: list[Any] = []
        query: dict[str, Any] = {"from_step": 0, "limit": limit}
        while True:
            page = (await api.client.get(f"{api.path}/trajectory", params=query)).json()
            assert page["episode"] == whole["episode"]
            steps += page["steps"]
            rated = {rating["step"] for rating in page["feedback"]}
            assert rated == {None, *({2, 6} & {step["step"] for step in page["steps"]})}
            if page["next_step"] is None:
                break
            assert page["closing"] is None
            query["from_step"] = page["next_step"]
        assert page["closing"] == whole["closing"]
        assert steps == whole["steps"], limit
    beyond = (await api.client.get(f"{api.path}/trajectory", params={"from_step": 50})).json()
    assert (beyond["steps"], beyond["closing"], beyond["next_step"]) == ([], None, None)


async def test_messages_are_paged_and_tokens_are_not(api: Served):
    await api.open(instructions="Play.")
    for step in range(4):
        await api.act(observation=f"o{step}")
    path, whole = f"{api.path}/trajectory", (await api.trajectory(format="messages"))["messages"]
    pages = [
        (await api.client.get(path, params={"format": "messages", "from_step": first, "limit": 2})).json()
        for first in (0, 2)
    ]
    assert pages[0]["messages"] + pages[1]["messages"] == whole
    assert [page["next_step"] for page in pages] == [2, None]
    for query in ({"from_step": 1}, {"limit": 1}):
        refused = await api.client.get(path, params={"format": "tokens", **query})
        assert (refused.status_code, refused.json()["errors"][0]["loc"]) == (422, ["query", *query])


async def test_a_page_of_a_fork_has_inherited_steps(api: Served):
    await api.open()
    for step in range(4):
        await api.act(observation=f"o{step}", reward=1.0)
    await api.client.post(f"{api.path}/fork", json={"at_step": 3, "episode_ids": ["f"]})
    await api.act("f", observation="own", reward=9.0)
    async with AsyncClient(api.url) as client:
        page = await (await client.resume("f")).trajectory(from_step=2, limit=1)
    assert [(step["observation"], step["reward"]) for step in page["steps"]] == [("o2", 9.0)]
    assert page["next_step"] == 3


@pytest.mark.parametrize("query", ["from_step=-1", "from_step=x", "limit=0", "limit=10001", f"from_step={2**31}"])
async def test_a_page_outside_the_limits_is_refused(api: Served, query: str):
    await api.open()
    assert (await api.client.get(f"{api.path}/trajectory?{query}")).status_code == 422
