"""JSON schemas of callers: which are refused, which values are valid, and that no schema makes validation slow."""

import contextlib
from typing import Any

import pytest

from service.validation.json_schema import MAX_SCHEMA_BYTES, Schema, SchemaMismatch, SchemaRefused


def test_the_text_is_the_schema_as_compact_json():
    assert Schema({"type": "object", "required": ["a"]}).text == '{"type":"object","required":["a"]}'


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "integer", "minimum": 3}, 3, 2),
        ({"enum": ["a", None]}, None, "b"),
        ({"properties": {"a": {"const": 1}}, "additionalProperties": False}, {"a": 1}, {"a": 1, "b": 2}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, None, 1),
        ({"$defs": {"n": {"type": "number"}}, "items": {"$ref": "#/$defs/n"}}, [1, 2.5], ["x"]),
        ({"not": {"type": "string"}}, 1, "x"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "ab", "a"),
        ({"uniqueItems": True}, [1, 2], [1, 1]),
    ],
)
def test_values_are_validated(schema: dict[str, Any], valid: Any, invalid: Any):
    Schema(schema).validate(valid)
    with pytest.raises(SchemaMismatch):
        Schema(schema).validate(invalid)


def alternatives(depth: int) -> dict[str, Any]:
    """Returns a schema in which each level refers to the level below twice, which takes 2**depth comparisons."""
    schema: dict[str, Any] = {"$defs": {"l0": {"type": "null"}}, "$ref": f"#/$defs/l{depth}"}
    for level in range(depth):
        below = {"$ref": f"#/$defs/l{level}"}
        schema["$defs"][f"l{level + 1}"] = {"allOf": [below, below]}
    return schema


def test_exponential_schema_is_stopped():
    Schema(alternatives(3)).validate(None)
    with pytest.raises(SchemaMismatch, match="too long"):
        Schema(alternatives(28)).validate(None)
    Schema(alternatives(3)).validate(None)


def test_a_nested_dialect_is_refused_and_a_property_of_that_name_is_not():
    evil = {"$schema": "https://json-schema.org/draft/2020-12/schema", "pattern": "^(a+)+$"}
    with pytest.raises(SchemaRefused, match="schema"):
        Schema({"items": evil})
    hostile = "a" * 40 + "!"
    with pytest.raises(SchemaMismatch, match="does not match"):
        Schema(evil).validate(hostile)
    Schema({"properties": {"$schema": {"type": "string"}}}).validate({"$schema": "a property of that name"})
    Schema({"const": {"$schema": "x", "$id": "y", "$ref": "z"}}).validate({"$schema": "x", "$id": "y", "$ref": "z"})


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"pattern": "b$"}, "ab", "ba"),
        ({"pattern": "^(a+)+$"}, "a" * 5000, "a" * 5000 + "!"),
        ({"format": "date"}, "2024-02-29", "2023-02-29"),
        ({"format": "no such format"}, "anything", None),
        ({"multipleOf": 0.01}, 0.07, 0.075),
        ({"patternProperties": {"^x-": {"type": "integer"}}}, {"x-a": 1, "y": "s"}, {"x-a": "s"}),
        ({"patternProperties": {"^x-": {}}, "additionalProperties": False}, {"x-a": 1}, {"y": 1}),
        ({"propertyNames": {"pattern": "^a"}}, {"ab": 1}, {"b": 1}),
        ({"items": [{"type": "integer"}], "additionalItems": False}, [1], [1, 2]),
        ({"minimum": 3, "exclusiveMinimum": True}, 4, 3),
        ({"dependencies": {"a": ["b"]}}, {"b": 1}, {"a": 1}),
        ({"items": [], "additionalItems": {"type": "null"}}, [None], [1]),
        ({"properties": {"a": {"items": [{"type": "null"}]}, "b": {"$ref": "#/properties/a/items/0"}}}, {}, {"b": 1}),
        (
            {
                "properties": {"v": {"$ref": "#/components/schemas/V"}},
                "components": {"schemas": {"V": {"type": "number", "minimum": 0, "exclusiveMinimum": True}}},
            },
            {"v": 1},
            {"v": 0},
        ),
        ({"$recursiveAnchor": True, "items": {"$recursiveRef": "#"}, "type": "array"}, [[]], [[1]]),
        ({"$dynamicAnchor": "n", "items": {"$dynamicRef": "#n"}, "type": "array"}, [[]], [[1]]),
        ({"properties": {"a": {"description": None, "title": 3, "type": "null"}}}, {"a": None}, {"a": 1}),
        ({"format": "email"}, "a" * 64 + "@b.c", "a" * 65 + "@b.c"),
        ({"format": "email"}, f"a@{'b.' * 126}c", f"a@{'b.' * 126}cc"),
        ({"format": "hostname"}, ".".join(["a" * 63] * 3 + ["a" * 61]), ".".join(["a" * 63] * 4)),
    ],
)
def test_patterns_formats_and_keywords_of_older_drafts_are_validated(schema: Any, valid: Any, invalid: Any):
    Schema(schema).validate(valid)
    if invalid is not None:
        with pytest.raises(SchemaMismatch):
            Schema(schema).validate(invalid)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"items": {"type": "nothing"}}}}, ("tool 't'", "parameter 'a[]'", "'type'")),
        ({"properties": {"a": {"maxLength": -1}}}, ("tool 't'", "parameter 'a'", "'maxLength'")),
        ({"properties": {"a": {"$ref": "https://example.com"}}}, ("tool 't'", "parameter 'a'", "'$ref'")),
        ({"$defs": {"d": {"$id": "x"}}}, ("tool 't'", "'$id'")),
        ({"properties": {"a": {"type": "any"}}}, ("parameter 'a'", "'type'", '"any"', "array, boolean, integer")),
        ({"properties": {"a": {"type": []}}}, ("parameter 'a'", "'type'", "[]")),
        ({"properties": {"a": {"required": True}}}, ("parameter 'a'", "'required'", "type array", "true")),
        ({"properties": {"a": {"properties": None}}}, ("parameter 'a'", "'properties'", "type object", "null")),
        ({"properties": {"a": {"required": ["b", "b"]}}}, ("parameter 'a'", "'required'", "twice")),
        ({"properties": {"a": {"multipleOf": 0}}}, ("parameter 'a'", "'multipleOf'", "greater than 0")),
    ],
)
def test_a_refusal_names_tool_place_and_keyword(schema: Any, words: tuple[str, ...]):
    with pytest.raises(SchemaRefused) as refusal:
        Schema(schema, owner="tool 't'", noun="parameter")
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize("schema", [{"$ref": "#/nowhere"}, {"$ref": "#"}, {"$dynamicRef": "#nowhere"}])
def test_a_reference_that_leads_nowhere_is_a_mismatch(schema: dict[str, Any]):
    with pytest.raises((SchemaMismatch, RecursionError)):
        Schema(schema).validate(1)


@pytest.mark.parametrize(
    "schema",
    [{"type": "nothing"}, {"description": "x" * MAX_SCHEMA_BYTES}, {"$ref": "https://example.com"}, {"allOf": []}],
)
def test_refused(schema: dict[str, Any]):
    with pytest.raises(SchemaRefused):
        Schema(schema)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"items": {"$ref": "#"}}, [[[]]]),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, {"a": 1}),
        ({"$ref": "#"}, 1),
        ({"multipleOf": 0.5}, 10**400),
    ],
)
def test_a_value_that_cannot_be_compared_is_no_crash(schema: dict[str, Any], value: Any):
    with contextlib.suppress(SchemaMismatch):
        Schema(schema).validate(value)


@pytest.mark.parametrize(
    ("value", "unique"),
    [
        ([1, True, "1", None, False, 0], True),
        ([1, 1.0], False),
        ([{"a": 1, "b": [2]}, {"b": [2.0], "a": 1}], False),
        ([[1], [True]], True),
        ([{}, []], True),
        (list(range(5_000)), True),
    ],
)
def test_unique_items_are_told_apart_as_json_does(value: list[Any], unique: bool):
    with contextlib.nullcontext() if unique else pytest.raises(SchemaMismatch, match="non-unique"):
        Schema({"uniqueItems": True}).validate(value)


def test_large_value_with_many_alternatives_is_stopped():
    """The error message of each failed alternative would contain the whole value."""
    with pytest.raises(SchemaMismatch, match="too long"):
        Schema({"anyOf": [{"type": "string"}] * 300}).validate([[number] * 500 for number in range(400)])
    Schema({"items": {"items": {"type": "integer"}}}).validate([[number] * 200 for number in range(100)])


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}]},
        {"not": {"$dynamicRef": "#"}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    ],
)
def test_endless_schema_is_a_mismatch_at_any_stack_depth(schema: dict[str, Any]):
    def validate(num_frames: int) -> None:
        if num_frames:
            return validate(num_frames - 1)
        with pytest.raises(SchemaMismatch, match="without end"):
            Schema(schema).validate({"a": 1})
        return None

    for num_frames in range(60):
        validate(num_frames)


def test_a_value_may_nest_as_the_schema_does():
    value: Any = {}
    for _ in range(40):
        value = {"child": value}
    Schema({"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False}).validate(value)
