"""Tests of action spaces: what they refuse, and how they parse actions."""

import json
from typing import Any

import pytest

from service.agent.action_spaces import (
    MAX_PATTERN_CHARS,
    DiscreteSpace,
    JsonSpace,
    RegexSpace,
    TextSpace,
    ToolsSpace,
)
from service.engine.base import ActionSpaceRefused
from service.validation.json_schema import MAX_NESTING, MAX_SCHEMA_BYTES


@pytest.mark.parametrize(
    ("actions", "why"),
    [
        (("one",), "1 actions"),
        ((), "0 actions"),
        (tuple(map(str, range(1025))), "1025 actions"),
        (("a", "a"), "distinct"),
        (("a", ""), "empty"),
    ],
)
def test_a_discrete_space_refuses(actions: tuple[str, ...], why: str):
    with pytest.raises(ActionSpaceRefused, match=why):
        DiscreteSpace.of({"actions": actions})


def test_equal_discrete_spaces_are_one():
    assert DiscreteSpace.of({"actions": ("x", "y")}) is DiscreteSpace.of({"actions": ("x", "y")})


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"description": "x" * MAX_SCHEMA_BYTES}, "bytes long"),
        (nested(MAX_NESTING), "deep"),
        ({"type": "no such type"}, "not a JSON schema"),
        ({"properties": []}, "not a JSON schema"),
        ({"$ref": "https://example.com/schema.json"}, "another document"),
        ({"properties": {"a": {"items": [{"$ref": "file:///etc/passwd"}]}}}, "another document"),
        ({"$dynamicRef": "other.json#x"}, "another document"),
    ],
)
def test_a_json_space_refuses(schema: dict[str, Any], why: str):
    with pytest.raises(ActionSpaceRefused, match=why):
        JsonSpace.of({"schema": schema})


def test_a_json_space_takes_what_is_just_within_its_bounds():
    JsonSpace.of({"schema": nested(MAX_NESTING - 2)})
    JsonSpace.of({"schema": {"$defs": {"a": {"type": "string"}}, "$ref": "#/$defs/a"}})


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def test_a_json_action_is_the_parsed_value():
    assert JsonSpace.of({"schema": POINT}).parse('{"x": 3}', "stop") == ({"x": 3}, None)


@pytest.mark.parametrize(
    ("text", "finish_reason", "kind"),
    [('{"x": "three"}', "stop", "schema"), ('{"x":', "stop", "json"), ('{"x": 3}', "length", "length")],
)
def test_a_json_text_that_is_no_action_says_why(text: str, finish_reason: str, kind: str):
    action, failure = JsonSpace.of({"schema": POINT}).parse(text, finish_reason)
    assert action is None
    assert failure is not None
    assert failure.kind == kind
    assert failure.detail


def test_a_hostile_pattern_in_a_schema_is_not_run_by_the_backtracking_matcher():
    hostile = "a" * 5000 + "!"
    for schema, value in (
        ({"type": "string", "pattern": "^(a+)+$"}, hostile),
        ({"patternProperties": {"^(a+)+$": {"type": "integer"}}}, {hostile: 1}),
        ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, {hostile: 1}),
        ({"patternProperties": {"^(a+)+$": {}}, "unevaluatedProperties": False}, {hostile: 1}),
        ({"propertyNames": {"pattern": "^(a+)+$"}}, {hostile: 1}),
    ):
        assert JsonSpace.of({"schema": schema}).parse(json.dumps(value), "stop") == (value, None)


def test_additional_properties_are_still_checked_where_no_pattern_says_which_they_are():
    action, failure = JsonSpace.of({"schema": POINT}).parse('{"x": 1, "y": 2}', "stop")
    assert action is None
    assert failure is not None
    assert failure.kind == "schema"


def test_a_schema_that_refers_to_itself_forever_is_a_parse_failure():
    action, failure = JsonSpace.of({"schema": {"$ref": "#"}}).parse("1", "stop")
    assert action is None
    assert failure is not None


def test_a_regex_space():
    assert RegexSpace.of({"pattern": "[ab]+"}).parse("ab", "stop") == ("ab", None)
    action, failure = RegexSpace.of({"pattern": "[ab]+c"}).parse("ab", "length")
    assert action is None
    assert failure is not None
    assert failure.kind == "length"
    with pytest.raises(ActionSpaceRefused, match="characters long"):
        RegexSpace.of({"pattern": "a" * (MAX_PATTERN_CHARS + 1)})


def test_any_text_is_a_text_action():
    assert TextSpace().parse("", "length") == ("", None)


@pytest.mark.parametrize("text", ["1" * 5000, '"\\ud800"', "[" * 250 + "]" * 250, "1e999", "-1e999", "NaN", "[" * 5000])
def test_a_value_that_could_not_be_kept_is_no_action(text: str):
    action, failure = JsonSpace.of({"schema": {}}).parse(text, "stop")
    assert action is None
    assert failure is not None
    assert failure.kind == "json"


def test_tools_are_bounded_together():
    tool = {"parameters": {"type": "object", "properties": {"x": {"enum": ["y" * 30_000]}}}}
    with pytest.raises(ActionSpaceRefused, match="too large"):
        ToolsSpace.of({"tools": [{"name": f"t{number}", **tool} for number in range(3)]})


def test_a_tool_that_takes_anything_is_refused():
    with pytest.raises(ActionSpaceRefused, match="type object"):
        ToolsSpace.of({"tools": [{"name": "f", "parameters": {"$ref": "#/$defs/a", "$defs": {"a": True}}}]})
