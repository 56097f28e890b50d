"""What a JSON value may be: any observation but null, integers of any size, and only text that can be stored."""

import copy
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from tests.api.routes.test_openai import EchoEngine
from tests.support.serving import Served, serve

LARGE = -(10**40) - 1
TOOL = {
    "name": "move",
    "description": "Moves.",
    "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
}
BODIES: dict[str, Any] = {
    "/episode": {
        "episode_id": "e",
        "profile": "assistant",
        "instructions": "Play.",
        "goal": "win",
        "action_space": {"type": "text"},
        "sampling": {"stop": ["x"]},
        "reasoning": {"max_tokens": 8, "history": "keep"},
        "context": {"overflow": "slide"},
        "policy": "toy-text",
        "tags": ["t"],
        "metadata": {"env": "lake", "seed": "7", "nested": [{"key": "value"}]},
        "group": "g",
    },
    "/episode ": {"action_space": {"type": "discrete", "actions": ["left", "right"]}},
    "/episode  ": {"action_space": {"type": "json", "schema": {"type": "object", "properties": {"a": {"const": "b"}}}}},
    "/episode   ": {"action_space": {"type": "regex", "pattern": "[a-z]{3}"}},
    "/episode    ": {"action_space": {"type": "tools", "tools": [TOOL]}},
    "/act": {
        "episode_id": "open",
        "observation": {"key": ["text"]},
        "info": {"key": {"more": "text"}},
        "legal_actions": ["left"],
    },
    "/act ": {"episode_id": "open", "observation": [{"type": "text", "text": "look"}]},
    "/episode/open/action": {"observation": "look", "action": {"any": "thing"}, "info": {"key": "text"}},
    "/episode/open/fork": {"n": 1, "episode_ids": ["f"], "group": "g"},
    "/episode/open/feedback": {"rating": 3, "comment": "good", "rater": "me"},
    "/episode/open/end": {"info": {"key": "text"}},
    "/policy/mine": {"path": "mine"},
}
TARGETS = [
    f"/{path}"
    for path in ("episode/{}", "episode/{}/trajectory", "episode?tag={}", "episode?cursor={}", "export?group={}")
]


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    async with serve(tmp_path, EchoEngine(tokenizer), adapters=adapters) as served:
        yield served


def spoiled(value: Any, character: str, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields each copy of the value that has the character in one of its strings or keys, and where."""
    if isinstance(value, str):
        yield place, f"{value[:1]}{character}{value[1:]}"
    elif isinstance(value, dict):
        for key, item in value.items():
            for where, changed in spoiled(item, character, (*place, key)):
                yield where, {**value, key: changed}
            rest = {name: other for name, other in value.items() if name != key}
            yield (*place, key), {**rest, f"{key}{character}": item}
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for where, changed in spoiled(item, character, (*place, index)):
                yield where, [*value[:index], changed, *value[index + 1 :]]


async def send(api: Served, path: str, body: Any) -> Any:
    method = "PUT" if path.startswith("/policy") else "POST"
    return await api.client.request(method, path.strip(), content=json.dumps(body).encode())


@pytest.mark.parametrize("path", BODIES)
async def test_a_lone_surrogate_is_refused_wherever_it_is(api: Served, path: str):
    await api.open("open")
    for place, body in spoiled(copy.deepcopy(BODIES[path]), "\ud800"):
        answer = await send(api, path, body)
        document = answer.json()
        assert (answer.status_code, document["code"]) == (422, "invalid_request"), (place, answer.text)
        assert len(document["errors"][0]["loc"]) == len(place)
        assert str(place[-1]) in document["detail"], place
    assert (await api.get("open"))["step"] == 0


@pytest.mark.parametrize(
    "spoilt",
    [
        {"episode_id": "\ud800", "observation": "look"},
        {"episode_id": "e", "observation": "\ud800"},
        {"episode_id": "e", "observation": "look", "\ud800": 1},
    ],
)
async def test_a_lone_surrogate_in_one_act_of_a_batch_affects_no_other(api: Served, spoilt: Any):
    await api.open("open")
    await api.open("e")
    answer = await send(api, "/act/batch", {"acts": [spoilt, {"episode_id": "open", "observation": "look"}]})
    refused, act = answer.json()["results"]
    assert (refused["status"], refused["code"], act["step"]) == (422, "invalid_request", 0)
    for body in ({"acts": [spoilt], "\ud800": 1}, {"acts": ["\ud800"]}, {"acts": "\ud800"}, {"acts": {"\ud800": 1}}):
        assert (await send(api, "/act/batch", body)).json()["code"] == "invalid_request", body


@pytest.mark.parametrize("path", BODIES)
async def test_a_nul_is_kept_or_refused_wherever_it_is(api: Served, path: str):
    await api.open("open")
    for place, body in spoiled(copy.deepcopy(BODIES[path]), "\0"):
        answer = await send(api, path, body)
        assert answer.status_code in (200, 201, 409, 422), (place, answer.text)
        if path == "/episode" and answer.status_code == 201:
            opened = answer.json()
            assert (await api.client.get(f"/episode/{opened['episode_id']}")).json() == opened
            await api.client.delete(f"/episode/{opened['episode_id']}")


@pytest.mark.parametrize("character", ["%00", "%ed%a0%80", "%ff", "%c0%80"])
async def test_such_a_character_in_a_path_or_a_query_is_no_failure(api: Served, character: str):
    for target in TARGETS:
        assert (await api.client.get(target.format(character))).status_code in (200, 404, 422), target
    for method, target in [("PUT", "/policy/{}"), ("DELETE", "/policy/{}"), ("POST", "/episode/{}/end")]:
        answer = await api.client.request(method, target.format(character), json={"path": "x"})
        assert answer.status_code in (404, 422), target


@pytest.mark.parametrize("name", [b"Idempotency-Key", b"X-Request-ID", b"X-Episode-Id", b"Authorization", b"Accept"])
async def test_bytes_that_are_no_text_in_a_header_are_no_failure(api: Served, name: bytes):
    await api.open("open")
    body = json.dumps({"episode_id": "open", "observation": "look"}).encode()
    answer = await api.client.post("/act", content=body, headers={name: b"\xed\xa0\x80\xff"})
    assert answer.status_code == 200, answer.text


async def test_a_retry_of_an_invalid_id_does_not_ask_the_store(api: Served):
    for episode_id in ("a\0b", "a" * 5000, "a:b", 7, None, ["a"]):
        answer = await api.client.post("/episode", json={"episode_id": episode_id, "profile": "nobody"})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), episode_id


# ---- large integers


async def test_an_integer_of_any_size_is_kept_exactly(tmp_path: Path, tokenizer: HFTokenizer):
    value = {
        "wei": 115792089237316195423570985008687907853269984665640564039457584007913129639935,
        "more": [LARGE, 1.5],
    }
    async with serve(tmp_path, EchoEngine(tokenizer)) as api:
        opened = await api.open(metadata=value, action_space={"type": "json", "schema": {}})
        assert opened["metadata"] == value
        for step in range(2):
            act = {"observation": value, "info": value, "step": step}
            recorded = await api.client.post(f"{api.path}/action", json={**act, "action": value})
            assert recorded.json()["action"] == value, recorded.text
            again = await api.client.post(f"{api.path}/action", json={**act, "action": value})
            assert again.json()["replayed"] is True
        fork = await api.client.post(f"{api.path}/fork", json={"episode_ids": ["f"]})
        assert fork.json()["episodes"][0]["metadata"] == value
        await api.client.post(f"{api.path}/end", json={"info": value})
    async with serve(tmp_path, EchoEngine(tokenizer)) as api:  # everything is read from the store
        other = await api.client.post("/episode", json={"episode_id": "e", "metadata": {"wei": 1.157920892373162e77}})
        assert other.status_code == 409
        assert (await api.get())["metadata"] == value
        listed = (await api.client.get("/episode")).json()["episodes"]
        assert [episode["metadata"] for episode in listed] == [value, value]
        exported = json.loads((await api.client.get("/export")).text)
        for read in (await api.trajectory(), exported):
            assert [(row["observation"], row["info"], row["action"]) for row in read["steps"]] == [(value,) * 3] * 2
            assert read["closing"]["info"] == value
        messages = (await api.trajectory(format="messages"))["messages"]
        assert messages[0]["content"] == json.dumps(value, separators=(",", ":"))


async def test_an_act_with_a_large_integer_is_answered_and_repeated(api: Served):
    await api.open()
    first = await api.act(observation=LARGE, step=0)
    again = await api.act(observation=LARGE, step=0)
    assert (again["replayed"], again["text"]) == (True, first["text"])
    changed = await api.post_act(observation=LARGE - 1, step=0)
    assert changed.json()["code"] == "idempotency_mismatch"


async def test_an_integer_too_long_for_any_number_names_its_place(api: Served):
    await api.open()
    content = b'{"episode_id":"e","observation":{"a":[0,' + b"9" * 5000 + b"]}}"
    answer = await api.client.post("/act", content=content)
    assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["observation", "a", 1]), answer.text


# ---- observations


@pytest.mark.parametrize(
    ("observation", "shown"),
    [
        ([0.02, -0.4], "[0.02,-0.4]"),
        ([], "[]"),
        ({}, "{}"),
        (0, "0"),
        (-1.5, "-1.5"),
        (True, "true"),
        (False, "false"),
        ("", ""),
        ("plain", "plain"),
        ([[1, "ü"], {"a": None}], '[[1,"ü"],{"a":null}]'),
        ([None], "[null]"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "text", "text": "one"}, "two"], '[{"type":"text","text":"one"},"two"]'),
        ([{"type": "text", "text": "one"}, {"type": "file"}], '[{"type":"text","text":"one"},{"type":"file"}]'),
        ([{"type": ["text"], "text": "one"}], '[{"type":["text"],"text":"one"}]'),
        ({"type": "image", "data": "x"}, '{"type":"image","data":"x"}'),
        ([{"title": "result", "url": "x"}], '[{"title":"result","url":"x"}]'),
    ],
)
async def test_any_value_but_null_is_an_observation(api: Served, observation: Any, shown: str):
    await api.open()
    await api.act(observation=observation, step=0)
    assert (await api.act(observation=observation, step=0))["replayed"]
    recorded = await api.client.post(f"{api.path}/action", json={"observation": observation, "action": "x"})
    assert recorded.status_code == 200, recorded.text
    assert [row["observation"] for row in (await api.trajectory())["steps"]] == [observation] * 2
    messages = (await api.trajectory(format="messages"))["messages"]
    assert [row["content"] for row in messages if row["role"] == "user"] == [shown] * 2
    assert all(row.keys() == {"role", "content"} for row in messages), "there is no thought, and no empty field for it"


async def test_null_is_no_observation(api: Served):
    await api.open()
    answer = await api.client.post("/act", json={"episode_id": "e", "observation": None})
    assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["observation"])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url"},
        {"type": "image", "data": "AAAA", "mime": "image/png"},
        {"type": "text"},
        {"type": "text", "text": 1},
        {"type": "text", "text": "x", "cache_control": {}},
    ],
)
async def test_a_part_that_the_policy_cannot_be_shown_is_named(api: Served, part: Any):
    await api.open()
    observation = [{"type": "text", "text": "one"}, part]
    single = await api.post_act(observation=observation)
    batch = await api.client.post("/act/batch", json={"acts": [{"episode_id": "e", "observation": observation}]})
    for document in (single.json(), batch.json()["results"][0]):
        assert (document["status"], document["code"]) == (422, "invalid_request")
        assert document["errors"][0]["loc"] == ["observation", 1]
        assert ("image" in document["detail"]) == (part["type"] != "text")
    assert (await api.get())["step"] == 0


# ---- bodies


@pytest.mark.parametrize("content", [b"", b"{}", b"\xef\xbb\xbf{}"])
async def test_an_empty_body_is_an_empty_object_where_every_field_is_optional(api: Served, content: bytes):
    opened = await api.client.post("/episode", content=content)
    assert opened.status_code == 201, opened.text
    path = opened.headers["location"]
    assert (await api.client.post(f"{path}/fork", content=content)).status_code == 201
    ended = await api.client.post(f"{path}/end", content=content)
    assert ended.json()["stop_reason"] == "aborted"


async def test_an_empty_body_is_malformed_where_a_field_is_required(api: Served):
    await api.open()
    for path in ("/act", "/act/batch", f"{api.path}/action", f"{api.path}/feedback"):
        problem = (await api.client.post(path)).json()
        assert problem["code"] == "malformed_json"
        assert "empty" in problem["detail"]


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        ("/act", {"episode_id": "e", "observaton": "x"}, "observaton: unknown field. Did you mean 'observation'?"),
        (
            "/episode",
            {"sampling": {"temprature": 1}},
            "sampling.temprature: unknown field. Did you mean 'temperature'?",
        ),
        (
            "/episode/e/feedback",
            {"rating": 1, "stars": 5},
            "stars: unknown field. The fields are rating, comment, rater, step.",
        ),
        ("/episode", {"context": {"zzz": 1}}, "context.zzz: unknown field. Check it for typos."),
    ],
)
async def test_an_unknown_field_is_named_with_the_one_that_was_meant(api: Served, path: str, body: Any, detail: str):
    await api.open()
    refused = await api.client.post(path, json=body)
    assert (refused.status_code, refused.json()["detail"]) == (422, detail)


@pytest.mark.parametrize(
    "accept", ["text/event-stream", "Text/Event-Stream; q=0.5", "application/json, TEXT/EVENT-STREAM"]
)
async def test_a_stream_is_asked_for_in_any_spelling(api: Served, accept: str):
    await api.open()
    answer = await api.post_act(headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/event-stream;q=0", "x-text/event-stream-x", ""])
async def test_an_answer_is_json_if_no_stream_is_asked_for(api: Served, accept: str):
    await api.open()
    answer = await api.post_act(headers={"Accept": accept})
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "content_type",
    ["application/JSON", "Application/Json; charset=utf-8", "application/problem+json", "text/plain", None],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_openai_bodies_are_strict_json_whatever_their_media_type(
    api: Served, content_type: str | None, path: str
):
    headers = {"Content-Type": content_type} if content_type else {}
    for content in (b"[" * 500 + b"]" * 500, b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":%d}' % 2**80):
        answer = await api.client.post(path, content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_json"), content[:20]


async def test_a_part_that_cannot_be_stored_fails_its_own_act_of_a_batch(api: Served):
    digits = "7" * 5000
    for number in range(4):
        await api.open(f"e{number}")
    acts = [
        '{"episode_id": "e0", "observation": "look"}',
        f'{{"episode_id": "e1", "observation": [1, -{digits}]}}',
        '{"episode_id": "e2", "observation": {"a": "\\ud800"}}',
        '{"episode_id": "e3", "observation": null}',
    ]
    answer = await api.client.post("/act/batch", content=f'{{"acts": [{", ".join(acts)}]}}'.encode())
    assert answer.status_code == 200, answer.text
    done, *failed = answer.json()["results"]
    assert done["step"] == 0
    assert [item["status"] for item in failed] == [422, 422, 422]
    assert failed[0]["detail"].startswith("observation.1: an integer of 5000 digits.")
    whole = await api.client.post("/act/batch", content=f'{{"acts": [], "n": {digits}}}'.encode())
    assert (whole.status_code, whole.json()["errors"][0]["loc"]) == (422, ["n"])
