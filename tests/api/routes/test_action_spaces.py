"""Action spaces over HTTP: the forms in which tools are given, and refusals that name tool, place and keyword."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=lambda _: '{"name":"f","arguments":{}}')) as served:
        yield served


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = {"name": "f", "description": "d", "parameters": SCHEMA}


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"type": "function", "function": {**TOOL, "strict": True}}, TOOL),
        ({"type": "function", **TOOL, "strict": None}, TOOL),
        ({"name": "f", "description": "d", "inputSchema": SCHEMA, "title": "F", "annotations": {}, "_meta": {}}, TOOL),
        ({"name": "f", "description": "d", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}, TOOL),
        ({"type": "custom", "name": "f", "description": "d", "input_schema": SCHEMA}, TOOL),
        (
            {"name": "f", "description": "d", "inputSchema": SCHEMA, "title": None, "outputSchema": None, "meta": None},
            TOOL,
        ),
        ({"name": "f", "description": "d", "input_schema": SCHEMA, "input_examples": [], "defer_loading": True}, TOOL),
        ({"type": "function", "function": {**TOOL, "return": {"type": "string"}}}, TOOL),
        ({"name": "f", "description": None, "parameters": None}, {"name": "f"}),
        ({"name": "f", "input_schema": None}, {"name": "f"}),
        ({"name": "server/tool" + "x" * 100, "parameters": {}}, {"name": "server/tool" + "x" * 100, "parameters": {}}),
        ({"name": "f", "parameters": {"properties": {}}}, {"name": "f", "parameters": {"properties": {}}}),
    ],
)
async def test_tools_are_taken_in_the_forms_that_people_have(
    api: Served, given: dict[str, Any], stored: dict[str, Any]
):
    opened = await api.open(action_space={"type": "tools", "tools": [given]})
    assert opened["action_space"]["tools"] == [stored]


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ({"functionDeclarations": [TOOL]}, ['{"name", "description", "parameters"}']),
        ({"type": "web_search"}, ["'web_search'", '{"name", "description", "parameters"}']),
        ({"type": "function", "function": TOOL, "name": "f"}, ["'function'"]),
        ({"name": "f", "parameters": SCHEMA, "inputSchema": SCHEMA}, ["'parameters'", "'inputSchema'"]),
        ({**TOOL, "unknown": 1}, ["unknown", '{"name", "description", "parameters"}']),
        ({"toolSpec": {"name": "f"}}, ["'toolSpec'", '{"name", "description", "parameters"}']),
        ({"type": "custom", "custom": {"name": "f"}}, ["'custom'", '{"name", "description", "parameters"}']),
        ({"parameters": SCHEMA}, ["name", '{"name", "description", "parameters"}']),
        ({"name": "f", "parameters": {"type": "OBJECT"}}, ["'f'", "'type'", '"OBJECT"']),
        ({**TOOL, "title": "F"}, ["title"]),
        ({"name": "", "parameters": SCHEMA}, ["name"]),
        ({"name": "a\nb", "parameters": SCHEMA}, ["name"]),
    ],
)
async def test_a_tool_whose_form_is_not_clear_is_refused_with_the_form_that_is(
    api: Served, tool: dict[str, Any], words: list[str]
):
    answer = await api.client.post("/episode", json={"action_space": {"type": "tools", "tools": [tool]}})
    assert answer.status_code == 422
    assert all(word in answer.json()["detail"] for word in words), answer.json()["detail"]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"type": "json", "schema": {"properties": {"a": {"items": {"not": {"minimum": 3}}}}}}, ["'a[]'", "'not'"]),
        (
            {"type": "json", "schema": {"properties": {"a": {"type": "string", "pattern": "(?<=a)"}}}},
            ["'a'", "'pattern'"],
        ),
        ({"type": "json", "schema": {"properties": {"a": {"type": "nothing"}}}}, ["'a'", "'type'"]),
        ({"type": "json", "schema": {"$ref": "#/$defs/" + "x" * 500}}, ["'$ref'"]),
        ({"type": "json", "schema": {"allOf": [{"$ref": "#"}]}}, ["'$ref'", "without end"]),
        ({"type": "json", "schema": {"type": "integer", "minimum": 2, "maximum": 1}}, ["no value"]),
        ({"type": "json", "schema": {"type": "string", "pattern": "^a{3}$", "maxLength": 2}}, ["no value"]),
        ({"type": "json", "schema": {"type": "string", "minLength": 3, "maxLength": 2}}, ["no value"]),
        ({"type": "regex", "pattern": "(a)\\1"}, ["backreference"]),
        ({"type": "regex", "pattern": "["}, ["pattern"]),
        ({"type": "json", "schema": True}, ["schema"]),
    ],
)
async def test_a_refusal_names_place_and_keyword(api: Served, space: dict[str, Any], words: list[str]):
    answer = await api.client.post("/episode", json={"action_space": space})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert all(word in detail for word in words), detail
    assert len(detail) < 400, "the caller's text was repeated in full"


async def test_recorded_actions_are_validated_with_their_patterns(api: Served):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "b$", "format": "hostname"}}}
    await api.open("e", action_space={"type": "json", "schema": schema})
    url = "/episode/e/action"
    for action in ({"a": "ba"}, {"a": "-b"}, {"a": 1}):
        answer = await api.client.post(url, json={"observation": "o", "action": action})
        assert answer.status_code == 422, action
        assert answer.json()["code"] == "invalid_request"
    answer = await api.client.post(url, json={"observation": "o", "action": {"z": 1, "a": "ab"}})
    assert answer.json()["action"] == {"z": 1, "a": "ab"}


async def test_a_violation_of_what_is_not_strict_is_a_parse_failure(api: Served):
    tools = [{"name": "f", "parameters": {"properties": {"x": {"type": "array", "uniqueItems": True}}, "not": {}}}]
    refused = await api.client.post("/episode", json={"action_space": {"type": "tools", "tools": tools}})
    assert refused.status_code == 422
    del tools[0]["parameters"]["not"]
    tools[0]["parameters"]["dependentRequired"] = {"x": ["y"]}
    tools[0]["parameters"]["if"] = {"maxProperties": 0}
    tools[0]["parameters"]["then"] = {"required": ["x"]}
    await api.open("e", action_space={"type": "tools", "tools": tools, "strict": False})
    acted = await api.act("e")
    assert acted["action"] is None
    assert acted["parse_failure"]["kind"] == "schema"
