"""Everything around an act: batches, forks, recorded actions, feedback, expiry, tools, profiles, lists, export."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.http.schemas import EpisodeFields
from service.engine.tokenizer import HFTokenizer
from service.sessions.profiles import PACKAGED, ProfileError, Profiles
from service.testing.scripted_engine import ScriptedEngine
from tests.support.databases import execute
from tests.support.postgres import free_port
from tests.support.serving import DISCRETE, HeldEngine, Served, serve, until

CALL = {"name": "move", "arguments": {"to": "door"}}
TOOLS = {
    "type": "tools",
    "tools": [
        {
            "name": "move",
            "description": "Go somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"to": {"$ref": "#/$defs/place"}},
                "required": ["to"],
                "$defs": {"place": {"enum": ["door", "window"]}},
            },
        },
        {"name": "wait"},
    ],
}


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    def reply(prompt: str) -> str:
        return json.dumps(CALL) if "Tools:" in prompt else "ok"

    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=reply)) as served:
        yield served


async def post(api: Served, path: str, **body: Any) -> httpx.Response:
    return await api.client.post(path, json=body)


def refused(answer: httpx.Response, status: int, code: str, *words: str) -> None:
    """Asserts that the answer is a problem with this status and code, and that its detail has these words."""
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert all(word in answer.json()["detail"] for word in words), answer.text


async def has_ended(api: Served, episode_id: str) -> None:
    async with asyncio.timeout(20):
        while (await api.get(episode_id))["status"] != "ended":  # noqa: ASYNC110 - no event signals the end
            await asyncio.sleep(0.01)


# Batches


async def test_a_batch_acts_in_order_and_a_bad_item_spoils_no_other(api: Served):
    for name in ("a", "b", "c"):
        await api.open(name, action_space=DISCRETE)
    acts = [
        {"episode_id": "c", "observation": "1", "step": 0},
        {"episode_id": "none", "observation": "2"},
        {"episode_id": "a", "observation": "3", "unknown": 1},
        {"episode_id": "b", "observation": "4", "step": 7},
        {"observation": "5"},
        {"episode_id": "a-", "observation": [{"type": "text", "text": 1}]},
    ]
    answer = await post(api, "/act/batch", acts=acts)
    assert answer.status_code == 200
    good, *bad = answer.json()["results"]
    assert (good["episode_id"], good["step"], good["done"]) == ("c", 0, False)
    assert [(item["status"], item["code"]) for item in bad] == [
        (404, "episode_not_found"),
        (422, "invalid_request"),
        (409, "step_conflict"),
        (422, "invalid_request"),
        (422, "invalid_request"),
    ]
    assert {item["request_id"] for item in bad} == {answer.headers["x-request-id"]}
    replayed = await api.act("c", "1", step=0)
    assert replayed["replayed"], "a single act is not recognized as a retry of the batch's"


@pytest.mark.parametrize(
    ("acts", "word"),
    [
        ([{"episode_id": "e", "observation": "1"}] * 2, "more than once"),
        ([{"episode_id": f"e{n}", "observation": "1"} for n in range(1025)], "1024"),
        ([], "acts"),
        ([1], "acts"),
    ],
)
async def test_a_bad_batch_does_nothing(api: Served, acts: list[Any], word: str):
    await api.open()
    refused(await post(api, "/act/batch", acts=acts), 422, "invalid_request", word)
    assert (await api.get())["step"] == 0


# Forks


async def _played(api: Served, num_steps: int, **fields: Any) -> None:
    await api.open(action_space=DISCRETE, tags=["t"], **fields)
    for step in range(num_steps):
        await api.act(observation=f"o{step}", step=step, reward=float(step))


async def test_a_fork_goes_on_from_where_it_branched(api: Served):
    await _played(api, 4)
    answer = await post(api, f"{api.path}/fork", at_step=2, n=3, episode_ids=["f0", "f1", "f2"])
    assert answer.status_code == 201
    forks = answer.json()["episodes"]
    assert [fork["episode_id"] for fork in forks] == ["f0", "f1", "f2"]
    for fork in forks:
        assert fork == await api.get(fork["episode_id"])
        assert (
            fork.items()
            >= {"parent": {"episode_id": "e", "step": 2}, "step": 2, "episode_return": 1.0, "group": "e"}.items()
        )
        assert (fork["tags"], fork["status"]) == (["t"], "active")
    parent, fork = await api.trajectory("e", "tokens"), await api.trajectory("f1", "tokens")
    shared = fork["segments"][0]["token_ids"]
    assert parent["segments"][0]["token_ids"][: len(shared)] == shared
    await api.act("f1", "another way", step=2, reward=5.0)
    assert (await api.get("f1"))["episode_return"] == 6.0
    assert (await api.get("e"))["step"] == 4, "the fork's act changed the parent"
    assert [step["observation"] for step in (await api.trajectory("f1"))["steps"]] == ["o0", "o1", "another way"]
    assert len(api.engine.prompts[-1]) > len(shared)
    assert api.engine.prompts[-1][: len(shared)] == shared


async def test_forks_survive_a_restart_and_their_parents_end(api: Served):
    await _played(api, 2)
    await post(api, f"{api.path}/fork", n=1, episode_ids=["f"])
    await api.act("f", "mine", step=2)
    await post(api, "/episode/f/fork", n=1, episode_ids=["g"])
    await api.client.delete(api.path)
    await api.client.delete("/episode/f")
    for name in ("e", "f", "g"):
        api.app.state.services.sessions._cache.drop(name)
    assert (await api.act("g", "on", step=3))["step"] == 3
    assert [step["observation"] for step in (await api.trajectory("g"))["steps"]] == ["o0", "o1", "mine", "on"]
    replay = await api.act("g", "o0", step=0, reward=0.0)
    assert replay["replayed"]
    assert replay["episode_id"] == "g"


async def test_an_ended_episode_can_be_forked_before_its_end(api: Served):
    await _played(api, 2)
    await api.act(observation=None, terminated=True, reward=9.0)
    fork = (await post(api, f"{api.path}/fork")).json()["episodes"][0]
    assert fork.items() >= {"status": "active", "step": 2, "episode_return": 1.0, "success": None}.items()
    assert (await api.act(fork["episode_id"], "again", step=2))["step"] == 2


async def test_a_retried_fork_finds_the_same_episodes(api: Served):
    await _played(api, 1)
    body = {"n": 2, "episode_ids": ["f0", "f1"], "group": "tries"}
    first = await post(api, f"{api.path}/fork", **body)
    again = await post(api, f"{api.path}/fork", **body)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    refused(await post(api, f"{api.path}/fork", **{**body, "group": "other"}), 409, "idempotency_mismatch")


async def test_forks_with_a_seed_draw_apart_but_the_first_as_the_parent(api: Served):
    await _played(api, 1, sampling={"seed": 5, "temperature": 1.0})
    forks = (await post(api, f"{api.path}/fork", n=8)).json()["episodes"]
    assert forks[0]["sampling"]["seed"] == 5
    assert len({fork["sampling"]["seed"] for fork in forks}) == 8
    twin = await api.act(forks[0]["episode_id"], "next")
    assert (await api.act(observation="next"))["action"] == twin["action"]


async def test_a_retried_fork_is_found_after_its_parent_is_gone(api: Served):
    await _played(api, 1)
    body = {"n": 2, "episode_ids": ["f0", "f1"]}
    first = await post(api, f"{api.path}/fork", **body)
    await api.client.delete(api.path)
    again = await post(api, f"{api.path}/fork", **body)
    assert (again.status_code, again.json()) == (200, first.json())
    refused(await post(api, f"{api.path}/fork", n=2, episode_ids=["f0", "f2"]), 410, "episode_deleted")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"at_step": 3}, 422, "invalid_request"),
        ({"n": 10_000}, 422, "invalid_request"),
        ({"n": 0}, 422, "invalid_request"),
        ({"n": 2, "episode_ids": ["x"]}, 422, "invalid_request"),
        ({"n": 2, "episode_ids": ["x", "x"]}, 422, "invalid_request"),
        ({"n": 2, "episode_ids": ["x", "e"]}, 409, "idempotency_mismatch"),
    ],
)
async def test_a_fork_that_cannot_be_makes_none(api: Served, body: dict[str, Any], status: int, code: str):
    await _played(api, 2)
    refused(await post(api, f"{api.path}/fork", **body), status, code)
    assert len((await api.client.get("/episode")).json()["episodes"]) == 1


async def test_no_fork_of_what_is_not_there(api: Served):
    refused(await post(api, "/episode/none/fork"), 404, "episode_not_found")
    await _played(api, 1)
    await api.client.delete(api.path)
    refused(await post(api, f"{api.path}/fork"), 410, "episode_deleted")


# Recorded actions


@pytest.mark.parametrize(
    ("space", "action", "text"),
    [
        ({"type": "text"}, "open it", "open it"),
        (DISCRETE, "left turn", "left turn"),
        ({"type": "regex", "pattern": "[a-c]+"}, "abc", "abc"),
        ({"type": "json", "schema": {"type": "integer"}}, 7, "7"),
        (TOOLS, CALL, json.dumps(CALL)),
    ],
)
async def test_somebody_elses_action_is_the_step(api: Served, space: dict[str, Any], action: Any, text: str):
    await api.open(action_space=space)
    body = {"observation": "look", "action": action, "step": 0}
    act = (await post(api, f"{api.path}/action", **body)).json()
    assert (
        act.items() >= {"step": 0, "action": action, "text": text, "finish_reason": "recorded", "logprob": None}.items()
    )
    assert api.engine.num_calls == 0
    assert (await post(api, f"{api.path}/action", **body)).json()["replayed"]
    await api.act(observation="next", step=1)
    assert text in api.engine.tokenizer.decode(api.engine.prompts[-1]), "the next prompt lacks the recorded action"
    segment = (await api.trajectory(format="tokens"))["segments"][0]
    drawn = sum(segment["loss_mask"])
    assert drawn <= len((await api.trajectory())["steps"][1]["text"]) + 1, (
        "tokens of the recorded action are in the loss mask"
    )


@pytest.mark.parametrize(
    ("space", "action", "extra"),
    [
        ({"type": "text"}, 7, {}),
        (DISCRETE, "fly", {}),
        (DISCRETE, ["left"], {}),
        (DISCRETE, "left", {"legal_actions": ["right"]}),
        ({"type": "regex", "pattern": "[a-c]+"}, "abd", {}),
        ({"type": "json", "schema": {"type": "integer"}}, "7", {}),
        (TOOLS, {"name": "move", "arguments": {"to": "roof"}}, {}),
    ],
)
async def test_an_action_that_is_not_of_the_space_is_refused(api: Served, space: Any, action: Any, extra: Any):
    await api.open(action_space=space)
    refused(await post(api, f"{api.path}/action", observation="x", action=action, **extra), 422, "invalid_request")
    assert (await api.get())["step"] == 0


async def test_an_action_is_not_recorded_where_the_episode_ends(api: Served):
    await api.open()
    body = {"observation": "x", "action": "go", "terminated": True}
    refused(await post(api, f"{api.path}/action", **body), 422, "invalid_request", "end it")
    assert (await api.get())["status"] == "active"


async def test_a_schema_that_refers_to_itself_without_end_is_refused(api: Served):
    schema = {"properties": {"a": {"$ref": "#/properties/a"}}}
    answer = await post(api, "/episode", action_space={"type": "json", "schema": schema})
    refused(answer, 422, "invalid_request", "itself", "'a'", "'$ref'")


async def test_recorded_steps_share_a_segment_where_thoughts_are_dropped(api: Served):
    await api.open(reasoning={"max_tokens": 8, "history": "drop"})
    for step in range(3):
        await post(api, f"{api.path}/action", observation="x", action="go", step=step)
    assert [segment["steps"] for segment in (await api.trajectory(format="tokens"))["segments"]] == [[0, 1, 2]]


async def test_what_an_answer_could_not_hold_is_refused_when_it_comes(api: Served):
    def nested(depth: int) -> Any:
        return json.loads("[" * depth + "]" * depth)

    for depth in (225, 245, 252):
        answer = await post(api, "/episode", episode_id=f"e{depth}", metadata={"m": nested(depth)})
        assert answer.status_code == (201 if depth == 225 else 400), depth
    await api.open()
    await post(api, f"{api.path}/action", observation={"o": nested(225)}, action="x")
    await api.act(observation=None, terminated=True)
    for path in ("/episode", f"{api.path}/trajectory", "/export", f"{api.path}/trajectory?format=messages"):
        assert (await api.client.get(path)).status_code == 200, path


# Feedback


async def test_ratings_are_kept_with_the_steps(api: Served):
    await api.open()
    await api.act()
    rated = await post(api, f"{api.path}/feedback", rating=4, comment="good", rater="ann", step=0)
    assert rated.status_code == 201
    await post(api, f"{api.path}/feedback", rating=2)
    assert [item["rating"] for item in (await api.trajectory())["feedback"]] == [4, 2]
    assert rated.json() == (await api.trajectory())["feedback"][0]


WRONG_RATINGS: list[dict[str, Any]] = [
    *({"rating": rating} for rating in (0, 6, 4.5, True)),
    {},
    {"rating": 3, "step": 1},
    {"rating": 3, "rater": "a\0"},  # PostgreSQL cannot store NUL
    {"rating": 3, "comment": "\0"},
]


@pytest.mark.parametrize("body", WRONG_RATINGS)
async def test_a_rating_that_cannot_be_is_refused(api: Served, body: dict[str, Any]):
    await api.open()
    await api.act()
    refused(await post(api, f"{api.path}/feedback", **body), 422, "invalid_request")
    assert (await api.trajectory())["feedback"] == []


async def test_no_rating_of_what_is_not_there(api: Served):
    refused(await post(api, "/episode/none/feedback", rating=3), 404, "episode_not_found")


# Expiry


async def test_an_idle_episode_ends_and_an_active_one_does_not(api: Served):
    await api.open("idle", idle_ttl_s=0.2)
    await api.open("busy", idle_ttl_s=30.0)
    await api.open("free")
    await has_ended(api, "idle")
    idle = await api.app.state.services.sessions.store.episode("idle")
    assert idle.state.ended_at - idle.config.created_at >= 0.2
    ended = await api.get("idle")
    assert (ended["status"], ended["stop_reason"], ended["success"]) == ("ended", "idle_ttl", None)
    assert (await api.get("busy"))["status"] == (await api.get("free"))["status"] == "active"
    refused(await api.post_act("idle"), 409, "episode_ended", "idle_ttl")


async def test_each_act_gives_the_whole_time_again(api: Served):
    store = api.app.state.services.sessions.store
    await api.open(idle_ttl_s=60.0)
    opened = await store.next_expiry()
    await api.act()
    acted = (await store.episode("e")).state
    assert acted.expires_at == acted.updated_at + 60.0 > opened
    assert await store.next_expiry() == acted.expires_at


async def test_what_expired_while_the_service_was_down_ends_when_it_is_up(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as first:
        await first.open(idle_ttl_s=0.3)
    await asyncio.sleep(0.4)
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as second:
        await has_ended(second, "e")
        assert (await second.get())["stop_reason"] == "idle_ttl"


async def test_an_idle_episode_ends_while_no_engine_is_loaded(tmp_path: Path, tokenizer: HFTokenizer):
    engines = [ScriptedEngine(tokenizer)]
    never = asyncio.Event()

    async def load() -> ScriptedEngine:
        if not engines:
            await never.wait()
        return engines.pop()

    async with serve(tmp_path, load, engine_backoff_s=0) as api:
        await api.open(idle_ttl_s=0.5)
        api.engine.die()
        assert (await api.client.get("/readyz")).status_code == 503
        await has_ended(api, "e")


async def test_the_settings_limits_hold_where_an_episode_names_none(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer), max_steps=1, idle_ttl_s=60.0) as api:
        assert (await api.open()).items() >= {"max_steps": 1, "idle_ttl_s": 60.0}.items()
        assert (await api.open("own", max_steps=5))["max_steps"] == 5
        assert (await api.open("null", max_steps=None, idle_ttl_s=None))["max_steps"] == 1
        await api.act()
        last = await api.act(reward=1.0)
        assert last["done"]
        assert (await api.get()).items() >= {"stop_reason": "max_steps", "episode_return": 1.0}.items()


# Tools


async def test_a_tool_is_called_and_its_result_observed(api: Served):
    await api.open(action_space=TOOLS, instructions="Leave.")
    act = await api.act()
    assert (act["action"], act["parse_failure"]) == (CALL, None)
    prompt = api.engine.tokenizer.decode(api.engine.prompts[0])
    assert "Go somewhere." in prompt
    assert "window" in prompt
    assert (await api.act(observation={"result": "the door is open"}))["action"] == CALL
    messages = (await api.trajectory(format="messages"))["messages"]
    assert messages[0]["content"].startswith("Leave.\n\nTools:")


def _tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": {"type": "object", **parameters}}


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([_tool("same"), _tool("same")], ("two tools", "same")),
        ([_tool(properties={"x": {"$ref": "#"}}, required=["x"])], ("'f'", "'x'", "no value is valid", "'$ref'")),
        ([_tool(properties={"x": {"$ref": "#/$defs/none"}})], ("has no target",)),
        ([_tool(properties={"x": {"$ref": "https://example.org/s"}})], ("another document",)),
        ([_tool(properties={"x": {"type": "integer", "not": {"const": 3}}})], ("'f'", "'not'")),
        ([{"name": "f", "parameters": {"type": "string"}}], ("object",)),
        ([{"name": "no\nlines"}], ("name",)),
        ([], ("tools",)),
        ([{"name": "f", "strict": True}], ("strict",)),
    ],
)
async def test_tools_that_cannot_be_are_refused_at_once(api: Served, tools: Any, words: tuple[str, ...]):
    answer = await post(api, "/episode", episode_id="e", action_space={"type": "tools", "tools": tools})
    refused(answer, 422, "invalid_request", *words)
    assert (await api.client.get("/episode/e")).status_code == 404


# Profiles


async def test_a_profile_fills_what_the_call_leaves_out(api: Served):
    opened = await api.open(profile="frozen-lake", sampling={"seed": 3}, tags=["mine"])
    assert opened["action_space"]["actions"] == ["left", "down", "right", "up"]
    assert opened["sampling"] == {"temperature": 0.0, "seed": 3}
    assert (opened["profile"], opened["tags"]) == ("frozen-lake", ["mine"])
    listed = (await api.client.get("/episode", params={"profile": "frozen-lake"})).json()["episodes"]
    assert [episode["episode_id"] for episode in listed] == ["e"]


async def test_the_profiles_are_listed_and_each_opens_an_episode(api: Served):
    profiles = (await api.client.get("/profile")).json()["profiles"]
    names = {profile["name"] for profile in profiles}
    assert names >= {
        "assistant",
        "translation",
        "summarization",
        "code",
        "frozen-lake",
        "cliff-walking",
        "taxi",
        "blackjack",
        "source-text",
    }
    refused(await post(api, "/episode", profile="source-text"), 422, "invalid_request", "only encoder-decoder models")
    for profile in profiles:
        assert profile["description"]
        if "template" in profile["fields"].get("context", {}):
            continue
        assert (await api.open(profile["name"], profile=profile["name"])).items() >= {
            "instructions": profile["fields"]["instructions"]
        }.items()


async def test_an_unknown_profile_is_refused(api: Served):
    refused(await post(api, "/episode", profile="nobody"), 422, "invalid_request", "nobody")
    refused(await post(api, "/episode", profile=3), 422, "invalid_request")


def test_the_toy_text_profiles_are_what_the_environments_say():
    import gymnasium

    from service.environments import describe

    for name, env_id in (
        ("frozen-lake", "episodic/FrozenLakeRandom-v0"),
        ("cliff-walking", "CliffWalking-v1"),
        ("taxi", "Taxi-v4"),
        ("blackjack", "Blackjack-v1"),
    ):
        text = describe(gymnasium.make(env_id))
        fields = next(profile for profile in Profiles(EpisodeFields) if profile.name == name).fields
        assert (fields["instructions"], fields["action_space"]) == (text.instructions, text.action_space)


def test_the_template_is_a_profile_once_its_comments_are_taken_off(tmp_path: Path):
    lines = (PACKAGED / "_template.toml").read_text().split("\n\n", 1)[1].splitlines()
    (tmp_path / "mine.toml").write_text("\n".join(line.removeprefix("# ") for line in lines))
    mine = next(profile for profile in Profiles(EpisodeFields, tmp_path) if profile.name == "mine")
    assert set(mine.fields) == set(EpisodeFields.model_fields)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "instruction = 'typo'"}, ("'a'", "instruction")),
        ({"a": "extends = 'b'", "b": "extends = 'a'"}, ("extends itself", "a -> b -> a")),
        ({"a": "extends = 'nobody'"}, ("nobody",)),
        ({"a": "extends = 3"}, ("a.toml", "extends")),
        ({"a": "goal ="}, ("a.toml",)),
        ({"a": "[sampling]\ntemperature = -1.0"}, ("temperature",)),
    ],
)
def test_a_profile_that_cannot_be_names_its_file(tmp_path: Path, files: dict[str, str], words: tuple[str, ...]):
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(ProfileError) as refusal:
        Profiles(EpisodeFields, tmp_path)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_profile_extends_another(tmp_path: Path):
    (tmp_path / "terse.toml").write_text("extends = 'assistant'\n[sampling]\nmax_tokens = 9")
    terse = next(profile for profile in Profiles(EpisodeFields, tmp_path) if profile.name == "terse")
    assert terse.fields["sampling"] == {"temperature": 0.7, "top_p": 0.95, "max_tokens": 9}
    assert "helpful" in terse.fields["instructions"]


# Lists and export


async def test_lists_are_filtered(api: Served):
    await api.open("a", tags=["x"], group="g")
    await api.open("b", tags=["x", "y"])
    for query, names in (
        ("tag=x", ["b", "a"]),
        ("tag=y", ["b"]),
        ("group=g", ["a"]),
        ("policy=scripted", ["b", "a"]),
        ("policy=no", []),
    ):
        listed = (await api.client.get(f"/episode?{query}")).json()["episodes"]
        assert [episode["episode_id"] for episode in listed] == names, query


@pytest.mark.parametrize("format", ["steps", "messages", "tokens"])
async def test_the_export_is_every_ended_trajectory(api: Served, format: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.api.routes.export._PAGE", 2)
    for number in range(5):
        await api.open(f"e{number}", tags=["odd"] if number % 2 else [])
        await api.act(f"e{number}")
        if number:
            await api.act(f"e{number}", None, terminated=True, reward=1.0)
    answer = await api.client.get("/export", params={"format": format})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["episode"]["episode_id"] for line in lines] == ["e4", "e3", "e2", "e1"]
    assert lines[0] == await api.trajectory("e4", format)
    odd = (await api.client.get("/export", params={"format": format, "tag": "odd"})).text
    assert len(odd.splitlines()) == 2
    active = (await api.client.get("/export", params={"status": "active"})).text
    assert json.loads(active)["episode"]["episode_id"] == "e0"


async def test_an_episode_that_is_deleted_meanwhile_is_left_out(api: Served, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        await api.open(name)
        await api.act(name, None, terminated=True)
    sessions = api.app.state.services.sessions
    page = sessions.page

    async def stale(*args: Any, **options: Any) -> Any:
        found, place = await page(*args, **options)
        if any(record.config.episode_id == "b" for record in found):
            await sessions.delete("b")
        return found, place

    monkeypatch.setattr(sessions, "page", stale)
    lines = (await api.client.get("/export")).text.splitlines()
    assert [json.loads(line)["episode"]["episode_id"] for line in lines] == ["a"]


async def test_an_export_that_fails_midway_is_cut_off(api: Served, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        await api.open(name)
        await api.act(name, None, terminated=True)
    store = api.app.state.services.sessions.store
    trajectory = store.trajectory

    async def broken(episode_id: str) -> Any:
        if episode_id == "a":
            raise RuntimeError("broken")
        return await trajectory(episode_id)

    monkeypatch.setattr(store, "trajectory", broken)
    with pytest.raises(httpx.RemoteProtocolError):
        await api.client.get("/export")


async def test_an_act_in_flight_keeps_no_other_episode_from_its_end(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, HeldEngine(tokenizer)) as api:
        await api.open("busy", idle_ttl_s=1.0)
        acting = asyncio.create_task(api.post_act("busy"))
        await until(lambda: api.engine.num_held)
        await api.open("idle", idle_ttl_s=1.0)
        await has_ended(api, "idle")
        assert (await api.get("busy"))["status"] == "active"
        api.engine.release.set()
        assert (await acting).status_code == 200
        await has_ended(api, "busy")


async def test_an_episode_that_is_not_accepted_any_more_ends_all_the_same(tmp_path: Path, tokenizer: HFTokenizer):
    space = {"type": "json", "schema": {"type": "integer"}}
    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=lambda _: "1")) as first:
        for name in ("idle", "acted", "over"):
            await first.open(
                name, action_space=space, sampling={"max_tokens": 500}, idle_ttl_s=0.3 if name == "idle" else None
            )
    # As if an older version with other rules had accepted a schema that this version refuses.
    make_schema_invalid = "UPDATE episodes SET request = replace(request, '\"integer\"', '3')"
    await execute(first.store_url, make_schema_invalid)
    async with serve(tmp_path, ScriptedEngine(tokenizer, max_model_len=400)) as second:
        await has_ended(second, "idle")
        refused(await second.post_act("acted"), 422, "invalid_request", "not accepted any more")
        assert (await second.act("acted", None, terminated=True, reward=1.0))["done"]
        assert (await second.client.post("/episode/over/end", json={})).json()["status"] == "ended"


def test_a_bad_profile_stops_the_start_and_is_named(tmp_path: Path):
    (tmp_path / "mine.toml").write_text("instruction = 'typo'")
    command = [sys.executable, "-m", "service", "serve"]
    folders = {"EPISODIC_PROFILES": str(tmp_path), "EPISODIC_DATA": str(tmp_path)}
    environment = {**os.environ, "EPISODIC_PORT": str(free_port()), **folders}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert "'mine': instruction" in failed.stderr
    assert "Traceback" not in failed.stderr
