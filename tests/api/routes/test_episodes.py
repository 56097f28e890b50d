"""Episodes over HTTP: opening, reading, listing, ending and deleting them, and their trajectories."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.databases import in_database
from tests.support.serving import DISCRETE, Served, serve


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


FIELDS: dict[str, Any] = {
    "instructions": "Play.",
    "goal": "win",
    "action_space": DISCRETE,
    "sampling": {"temperature": 0.5, "seed": 3},
    "context": {"overflow": "end", "max_tokens": 512},
    "max_steps": 9,
    "tags": ["a", "b"],
    "metadata": {"nested": {"x": [1, None, "ü"]}},
    "group": "g",
    "policy": "scripted",
}


async def test_an_episode_repeats_what_was_asked_for(api: Served):
    opened = await api.open(**FIELDS)
    assert opened == await api.get()
    assert opened.items() >= FIELDS.items()
    assert opened.items() >= {"status": "active", "step": 0, "episode_return": 0.0, "num_tokens": 0}.items()
    assert {name for name, value in opened.items() if value is None} == {
        *("stop_reason", "success", "parent", "ended_at"),
        *("profile", "reasoning", "idle_ttl_s"),
    }
    assert opened["policy_version"] == "scripted-1"


async def test_defaults_are_shown(api: Served):
    opened = await api.open()
    assert opened["action_space"] == {"type": "text"}
    assert opened["context"]["overflow"] == "slide"
    assert (opened["instructions"], opened["tags"], opened["metadata"]) == ("", [], {})


async def test_an_id_is_made_in_the_order_of_time(api: Served):
    made = [(await api.client.post("/episode", json={})).json()["episode_id"] for _ in range(3)]
    assert sorted(made) == made
    assert len(set(made)) == 3
    assert all(name[14] == "7" for name in made), "UUIDv7"


async def test_the_resource_moves_with_each_step(api: Served):
    opened = await api.open()
    await api.act(observation="a")
    await api.act(observation="b", reward=0.25)
    moved = await api.get()
    tokens = (await api.trajectory(format="tokens"))["segments"][0]["token_ids"]
    assert (moved["step"], moved["episode_return"], moved["num_tokens"]) == (2, 0.25, len(tokens))
    assert moved["created_at"] == opened["created_at"] < moved["updated_at"]
    ended = (await api.client.post("/episode/e/end", json={"truncated": True})).json()
    assert ended["status"] == "ended"
    assert ended["ended_at"] == ended["updated_at"] >= moved["updated_at"]


async def test_listing_pages_newest_first(api: Served):
    for number in range(7):
        await api.open(f"e{number}")
    await api.client.post("/episode/e3/end", json={"terminated": True})
    await api.client.delete("/episode/e5")
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await api.client.get("/episode", params={"limit": 2, **cursor})).json()
        found += [episode["episode_id"] for episode in page["episodes"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert found == ["e6", "e4", "e3", "e2", "e1", "e0"]
    ended = (await api.client.get("/episode", params={"status": "ended"})).json()["episodes"]
    assert [episode["episode_id"] for episode in ended] == ["e3"]


async def test_an_empty_trajectory_in_each_format(api: Served):
    await api.open()
    for name, empty in (
        ("steps", {"steps": [], "closing": None}),
        ("messages", {"messages": []}),
        ("tokens", {"segments": []}),
    ):
        assert (await api.trajectory(format=name)).items() >= {**empty, "format": name}.items()


async def test_an_episode_that_ended_before_its_first_step(api: Served):
    await api.open()
    assert (await api.act(observation="over already", reward=1.0, terminated=True))["done"]
    trajectory = await api.trajectory()
    assert trajectory["steps"] == []
    assert trajectory["closing"]["observation"] == "over already"
    assert (await api.get())["episode_return"] == 1.0


async def test_steps_hold_what_was_said_and_chosen(api: Served):
    await api.open(action_space=DISCRETE)
    answer = await api.act(observation={"n": 1}, info={"secret": 2}, legal_actions=["left", "right"])
    await api.act(observation="b", reward=2.0)
    first, second = (await api.trajectory())["steps"]
    assert first.items() >= {"step": 0, "observation": {"n": 1}, "info": {"secret": 2}, "reward": 2.0}.items()
    assert first["legal_actions"] == ["left", "right"]
    for name in ("action", "text", "action_probs", "logprob", "finish_reason", "usage", "policy_version"):
        assert first[name] == answer[name]
    assert (second["reward"], second["legal_actions"]) == (None, None)


async def test_info_is_not_shown_to_the_policy(api: Served):
    await api.open(metadata={"secret": "zebra"}, tags=["zebra"])
    await api.act(observation="look", info={"secret": "zebra"})
    assert "zebra" not in api.engine.tokenizer.decode(api.engine.prompts[0])


async def test_a_discrete_trajectory_scores_what_the_policy_decided(api: Served):
    """The logprobs of the drawn tokens sum to the logprob of the action."""
    await api.open(action_space=DISCRETE, sampling={"temperature": 1.0, "seed": 1})
    answers = [await api.act(observation=f"{step}") for step in range(5)]
    (segment,) = (await api.trajectory(format="tokens"))["segments"]
    drawn = [p for p, m in zip(segment["logprobs"], segment["loss_mask"], strict=True) if m]
    assert sum(drawn) == pytest.approx(sum(answer["logprob"] for answer in answers), abs=1e-4)
    assert all(p == 0.0 for p, m in zip(segment["logprobs"], segment["loss_mask"], strict=True) if not m)


async def test_segments_of_a_sliding_context_learn_each_step_once(api: Served):
    await api.open(context={"overflow": "slide", "max_tokens": 120}, sampling={"max_tokens": 8})
    for step in range(30):
        await api.act(observation=f"observation {step}")
    segments = (await api.trajectory(format="tokens"))["segments"]
    num_drawn = sum(step["usage"]["completion_tokens"] for step in (await api.trajectory())["steps"])
    assert sum(sum(segment["loss_mask"]) for segment in segments) == num_drawn
    for segment, prompt in zip(segments[1:], [api.engine.prompts[s["steps"][0]] for s in segments[1:]], strict=True):
        assert segment["token_ids"][: len(prompt)] == prompt, (
            "the segment does not begin with the prompt of its first step"
        )
        assert not any(segment["loss_mask"][: len(prompt)])


async def test_a_deleted_episodes_words_are_gone_from_the_disk(api: Served):
    await api.open(goal="zebra-goal")
    await api.act(observation="zebra-word")
    assert (await api.client.delete("/episode/e")).status_code == 204

    def read(connection: Connection) -> list[str]:
        statements = [text(f"SELECT * FROM {table}") for table in ("episodes", "steps")]  # noqa: S608
        return [str(row) for statement in statements for row in connection.execute(statement)]

    rows = await in_database(api.store_url, read)
    assert rows
    assert "zebra" not in json.dumps(rows)


async def test_an_id_that_no_text_can_hold_is_refused(api: Served):
    answer = await api.client.post("/episode", content=b'{"episode_id": "\\ud800"}')
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("field", ["profile", "policy"])
async def test_an_unknown_name_is_refused_with_the_valid_ones(api: Served, field: str):
    valid = {"profile": "frozen-lake", "policy": (await api.client.get("/version")).json()["policy"]}
    answer = await api.client.post("/episode", json={field: "no-such-name"})
    assert answer.status_code == 422
    assert "no-such-name" in answer.json()["detail"]
    assert valid[field] in answer.json()["detail"]
