"""Tests of action spaces: what they refuse, and how they parse actions."""

import json
from typing import Any

import pytest

from service.agent.action_spaces import (
    DiscreteSpace,
    JsonSpace,
    RegexSpace,
    TextSpace,
    ToolsSpace,
)
from service.engine.base import ActionSpaceRefused
from service.validation.json_schema import MAX_NESTING, MAX_SCHEMA_BYTES
from service.validation.patterns import MAX_PATTERN_CHARS


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


def test_patterns_are_matched_in_linear_time():
    hostile = "a" * 5000 + "!"
    for schema, value in (
        ({"type": "string", "pattern": "^(a+)+$"}, hostile),
        ({"patternProperties": {"^(a+)+!$": {"type": "string"}}}, {hostile: 1}),
        ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, {hostile: 1}),
        ({"propertyNames": {"pattern": "^(a+)+$"}}, {hostile: 1}),
        ({"patternProperties": {"^(a+)+$": {}}, "unevaluatedProperties": False}, {hostile: 1}),
    ):
        action, failure = JsonSpace.of({"schema": schema}).parse(json.dumps(value), "stop")
        assert action is None
        assert failure is not None
        assert failure.kind == "schema"


def test_unevaluated_properties_are_not_matched_with_patterns_by_the_library():
    schema = {"allOf": [{"patternProperties": {"^(a+)+$": {}}}], "unevaluatedProperties": False}
    with pytest.raises(ActionSpaceRefused, match="'unevaluatedProperties'"):
        JsonSpace.of({"schema": schema, "strict": False})


def test_additional_properties_are_still_checked_where_no_pattern_says_which_they_are():
    action, failure = JsonSpace.of({"schema": POINT}).parse('{"x": 1, "y": 2}', "stop")
    assert action is None
    assert failure is not None
    assert failure.kind == "schema"


def test_a_schema_that_refers_to_itself_forever_is_refused():
    with pytest.raises(ActionSpaceRefused, match="without end"):
        JsonSpace.of({"schema": {"$ref": "#"}})


def test_keywords_that_cannot_be_enforced_are_refused_or_checked_afterwards():
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(ActionSpaceRefused, match="'uniqueItems'"):
        JsonSpace.of({"schema": schema})
    space = JsonSpace.of({"schema": schema, "strict": False})
    assert space.parse("[1,2]", "stop") == ([1, 2], None)
    action, failure = space.parse("[1,1]", "stop")
    assert action is None
    assert failure is not None
    assert failure.kind == "schema"
    with pytest.raises(ActionSpaceRefused, match="non-unique"):
        space.write([1, 1])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("pattern", "name"),
    [("(?<=a)b", "lookbehind"), (r"(a)\1", "backreference"), (r"\bfoo", "boundary"), ("a(?=b)", "lookahead")],
)
def test_patterns_that_nothing_can_check_are_refused_by_name(pattern: str, name: str, strict: bool):
    tools = [{"name": "push", "parameters": {"properties": {"branch": {"type": "string", "pattern": pattern}}}}]
    with pytest.raises(ActionSpaceRefused) as refusal:
        ToolsSpace.of({"tools": tools, "strict": strict})
    assert all(word in str(refusal.value) for word in ("tool 'push'", "parameter 'branch'", "'pattern'", name))


def test_a_regex_space():
    assert RegexSpace.of({"pattern": "[ab]+"}).parse("ab", "stop") == ("ab", None)
    action, failure = RegexSpace.of({"pattern": "[ab]+c"}).parse("ab", "length")
    assert action is None
    assert failure is not None
    assert failure.kind == "length"
    with pytest.raises(ActionSpaceRefused, match="characters long"):
        RegexSpace.of({"pattern": "a" * (MAX_PATTERN_CHARS + 1)})
    assert RegexSpace.of({"pattern": "^ab$"}).write("ab") == "ab"
    with pytest.raises(ActionSpaceRefused, match="whole pattern"):
        RegexSpace.of({"pattern": "a|b"}).write("ab")
    with pytest.raises(ActionSpaceRefused, match="no text"):
        RegexSpace.of({"pattern": "a^b"})


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


def test_parameters_that_are_no_object_are_refused():
    for parameters in ({"type": "string"}, {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, {"not": {}}):
        with pytest.raises(ActionSpaceRefused, match="tool 'f'"):
            ToolsSpace.of({"tools": [{"name": "f", "parameters": parameters}]})


def test_a_tool_call_is_validated_by_the_schema_of_its_tool():
    tools = [
        {
            "name": "a/b",
            "parameters": {"properties": {"x": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}},
        },
        {"name": "stop", "parameters": None},
    ]
    space = ToolsSpace.of({"tools": tools})
    assert json.loads(space.write({"name": "a/b", "arguments": {"x": 1}}))["name"] == "a/b"
    for call in (
        {"name": "a/b", "arguments": {"x": "s"}},
        {"name": "stop", "arguments": {"x": 1}},
        {"name": "none", "arguments": {}},
        {"name": "stop"},
        "stop",
    ):
        with pytest.raises(ActionSpaceRefused):
            space.write(call)
