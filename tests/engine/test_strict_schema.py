"""Rewriting of schemas: references are expanded, enums narrowed, and keywords that the grammar ignores refused."""

from typing import Any

import pytest

from service.engine.strict_schema import strict
from service.validation.json_schema import SchemaRefused

INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "rewritten"),
    [
        ({"type": "string", "enum": ["a", 1]}, {"enum": ["a"]}),
        ({"const": 3, "type": "integer", "title": "T"}, {"enum": [3], "title": "T"}),
        ({"enum": [1, 9], "maximum": 5}, {"enum": [1]}),
        ({"enum": [{"$ref": "#/none"}, {"$defs": 1}]}, {"enum": [{"$ref": "#/none"}, {"$defs": 1}]}),
        ({"$ref": "#/$defs/n", "description": "d", "$defs": {"n": INTEGER}}, {**INTEGER, "description": "d"}),
        ({"definitions": {"a/b": INTEGER}, "items": {"$ref": "#/definitions/a~1b"}}, {"items": INTEGER}),
        ({"properties": {"$defs": INTEGER, "enum": INTEGER}}, {"properties": {"$defs": INTEGER, "enum": INTEGER}}),
        ({"allOf": [{**INTEGER, "title": "in"}], "title": "out"}, {**INTEGER, "title": "out"}),
        ({**INTEGER, "anyOf": [{**INTEGER, "minimum": 3}]}, {"anyOf": [{**INTEGER, "minimum": 3}]}),
        ({"$schema": "http://json-schema.org/draft-07/schema#", **INTEGER}, INTEGER),
        (
            {"type": "array", "items": True, "prefixItems": [False]},
            {"type": "array", "items": True, "prefixItems": [False]},
        ),
    ],
)
def test_a_schema_is_rewritten_without_what_the_grammar_passes_over(schema: Any, rewritten: Any):
    assert strict(schema) == rewritten


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": INTEGER}, "'not'"),
        ({"properties": {"a": {"if": INTEGER, "then": INTEGER}}}, "'if'"),
        ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"type": "object", "items": {"dependentSchemas": {"a": True}}}, "'dependentSchemas'"),
        ({"allOf": [INTEGER, INTEGER]}, "several"),
        ({"properties": {"a": INTEGER}, "anyOf": [{"required": ["a"]}]}, "required"),
        ({"properties": {"a": INTEGER}, "anyOf": [INTEGER]}, "beside anyOf"),
        ({**INTEGER, "oneOf": [{"type": "string"}]}, "beside oneOf"),
        ({"minLength": 3}, "without a type"),
        ({"type": "object", "required": ["z"]}, "'z' is in 'required'"),
        ({"type": "integer", "enum": ["a"]}, "none of the values"),
        ({"type": "string", "pattern": "a", "enum": ["b"]}, "beside enum"),
        ({"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": INTEGER}}, "beside $ref"),
        ({"items": {"$ref": "#"}}, "recursive"),
        (
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "items": {"$ref": "#/$defs/a"}},
            "recursive",
        ),
        ({"items": {"$ref": "#/$defs/none"}}, "has no target"),
        ({"items": {"$ref": "#anchor"}}, "not a JSON pointer"),
        ({"items": {"$dynamicRef": "#a"}}, "'$dynamicRef'"),
        ({"items": 3}, "not a JSON schema"),
    ],
)
def test_unsupported_keyword_is_refused_by_name(schema: Any, word: str):
    with pytest.raises(SchemaRefused) as refusal:
        strict(schema)
    assert word in str(refusal.value)


def test_references_that_double_at_each_level_are_refused_soon():
    two = {
        f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}, "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}]}
        for n in range(25)
    }
    with pytest.raises(SchemaRefused, match="too large"):
        strict({"$ref": "#/$defs/d0", "$defs": {**two, "d25": INTEGER}})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"const": {"properties": 5}}, "b": {"$ref": "#/properties/a/const"}}},
        {"properties": {"a": {"const": {"required": 5}}, "b": {"$ref": "#/properties/a/const"}}},
        {"properties": {"a": {"const": 5}, "b": {"$ref": "#/properties/a/const"}}},
    ],
)
def test_a_reference_to_what_is_no_schema_is_refused(schema: Any):
    with pytest.raises(SchemaRefused):
        strict(schema)


def test_references_that_nest_without_end_are_refused():
    def nested(inner: Any) -> Any:
        for _ in range(20):
            inner = {"items": inner}
        return inner

    chained = {f"d{n}": nested({"$ref": f"#/$defs/d{n + 1}"}) for n in range(60)}
    with pytest.raises(SchemaRefused):
        strict({"$ref": "#/$defs/d0", "$defs": {**chained, "d60": INTEGER}})


LISTED = {"enum": list(range(1000))}
SLOW: list[Any] = [{"anyOf": [{"items": {"anyOf": [{"type": "string"}] * 10}}] * 10}] * 10


def _nested(levels: int) -> Any:
    """Returns a schema of nested definitions around a long enum, with a reference to each level."""
    inner: Any = {"enum": list(range(3000))}
    for _ in range(levels):
        inner = {"type": "string", "$defs": {"d": inner}}
    return {**inner, "properties": {f"p{i}": {"$ref": "#" + "/$defs/d" * i} for i in range(1, levels)}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"e": LISTED}, "properties": {f"p{i}": {"$ref": "#/$defs/e"} for i in range(20)}},
        {"properties": {"a": {"enum": [[i] for i in range(1000)], "anyOf": [*SLOW, True]}}},
        _nested(14),
    ],
    ids=["values", "comparisons", "places"],
)
def test_expensive_short_schema_is_refused(schema: Any):
    with pytest.raises(SchemaRefused, match="too l"):
        strict(schema)


def test_each_reference_target_is_checked_once(monkeypatch: pytest.MonkeyPatch):
    checked: list[Any] = []
    monkeypatch.setattr("service.engine.strict_schema.Schema", checked.append)
    spelled = ["#/$defs/big", "#/%24defs/big", "#/$defs/%62ig", "#/$defs/b%69g", "#/%24defs/bi%67"]
    schema = {"$defs": {"big": INTEGER}, "properties": {f"p{i}": {"$ref": name} for i, name in enumerate(spelled)}}
    strict(schema)
    assert len(checked) == 2, "the target was checked once for each spelling"
