"""Grammars of JSON schemas: hostile schemas are refused or stay small, and numbers are bounded."""

import json
from typing import Any

import pytest

from service.engine.json_grammar import compiled, compiled_pattern
from service.validation import lark
from service.validation.json_schema import Schema, SchemaRefused
from service.validation.number_patterns import MAX_INTEGER, MIN_INTEGER

INTEGER = {"type": "integer"}


def writes(schema: dict[str, Any], text: str) -> bool:
    return lark.accepts(lark.matcher(compiled(Schema(schema), strict=True)), text)


def _combined(num_schemas: int) -> dict[str, Any]:
    """Returns schemas whose conjunctions differ at every level."""
    schemas: dict[str, Any] = {
        f"t{n}": {
            "type": "object",
            "properties": {
                "a": {"$ref": f"#/$defs/t{n * 2 % num_schemas}"},
                "b": {"$ref": f"#/$defs/t{(n * 3 + 1) % num_schemas}"},
            },
        }
        for n in range(num_schemas)
    }
    again = [{"$ref": "#/$defs/r"}, {"$ref": "#/$defs/t3"}]
    schemas["r"] = {"allOf": [{"$ref": "#/$defs/t1"}, {"properties": {"a": {"allOf": again}, "b": {"allOf": again}}}]}
    return {"$ref": "#/$defs/r", "$defs": schemas}


SLOW: list[Any] = [{"anyOf": [{"items": {"anyOf": [{"type": "string"}] * 10}}] * 10}] * 10
HOSTILE: dict[str, dict[str, Any]] = {
    "alternatives multiply": {"allOf": [{"anyOf": [{"minLength": n}, {"maxLength": n}]} for n in range(20)]},
    "conjunctions multiply": _combined(600),
    "comparisons": {"properties": {"a": {"enum": [[n] for n in range(1000)], "anyOf": [*SLOW, True]}}},
    "long classes": {"properties": {f"p{n}": {"type": "string", "pattern": r"^\p{L}+" + str(n)} for n in range(200)}},
    "length and pattern": {"type": "string", "pattern": "^[a-z]+$", "minLength": 10**9},
    "counted properties": {
        "properties": {f"p{n}": True for n in range(600)},
        "minProperties": 300,
        "maxProperties": 500,
    },
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_schema_is_refused(schema: dict[str, Any]):
    with pytest.raises(SchemaRefused):
        compiled(Schema(schema), strict=True)


def test_references_that_double_at_each_level_stay_small():
    two = {
        f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}, "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}]}
        for n in range(25)
    }
    grammar = compiled(Schema({"$ref": "#/$defs/d0", "$defs": {**two, "d25": INTEGER}}), strict=True)
    assert len(grammar) < 50_000


@pytest.mark.parametrize("additional", [True, False])
def test_all_of_many_optional_properties_can_be_written(additional: bool):
    properties: dict[str, Any] = {f"p{n}": {} for n in range(4000)}  # more than a stack of 8 MiB has room for
    schema = {"type": "object", "properties": properties, "additionalProperties": additional}
    matcher = lark.matcher(compiled(Schema(schema), strict=True))
    assert lark.accepts(matcher.deep_copy(), '{"p7":1,"p1499":2,"p3999":3}')
    assert not lark.accepts(matcher.deep_copy(), '{"p7":1,"p6":2,"p6":3}')
    assert lark.accepts(matcher.deep_copy(), '{"other":1}') == additional


@pytest.mark.parametrize(
    ("keyword", "text"), [("maxItems", "[1,2]"), ("maxProperties", '{"a":1}'), ("maxLength", '"ab"')]
)
def test_a_maximum_of_any_size_is_accepted(keyword: str, text: str):
    assert writes({keyword: 10**40}, text)


IMPOSSIBLE = {"type": "integer", "minimum": 2, "maximum": 1}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"minItems": 10**9}, ("'v'", "'minItems'")),
        ({"minProperties": 10**9, "additionalProperties": False}, ("'v'", "'minProperties'")),
        ({"patternProperties": {f"^{n}": {} for n in range(6)}}, ("'v'", "'patternProperties'")),
        (HOSTILE["counted properties"] | {"additionalProperties": False}, ("'v'", "'minProperties'")),
        (IMPOSSIBLE, ("'v'", "no value is valid", "'minimum', 'maximum'")),
        ({"items": IMPOSSIBLE, "minItems": 1, "type": "array"}, ("'v[]'", "no value is valid", "'minimum'")),
        (
            {"type": "object", "properties": {"a": {}, "b": False}, "required": ["b"]},
            ("'v'", "no value is valid", "'required'"),
        ),
        ({"anyOf": [IMPOSSIBLE, {"enum": []}]}, ("'v'", "no value is valid", "'anyOf'")),
    ],
)
def test_a_refusal_names_the_place_and_the_keyword(schema: dict[str, Any], words: tuple[str, ...]):
    with pytest.raises(SchemaRefused) as refusal:
        compiled(Schema({"type": "object", "properties": {"v": schema}, "required": ["v"]}), strict=True)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_large_lists_of_values_are_accepted():
    cities = {"$defs": {"city": {"enum": [f"City {n}" for n in range(2000)]}}}
    schema = {"type": "object", "properties": {name: {"$ref": "#/$defs/city"} for name in ("from", "to")}, **cities}
    assert writes(schema, '{"from":"City 1","to":"City 1999"}')
    assert not writes(schema, '{"from":"City 2000"}')


@pytest.mark.parametrize(
    "schema", [{}, {"type": "number"}, {"type": "number", "minimum": 0}, INTEGER, {"minimum": 0.5}]
)
def test_numbers_have_an_end(schema: dict[str, Any]):
    for text in ("1" * 400, "0." + "1" * 400, "1e" + "1" * 400, "1." + "0" * 400):
        matcher = lark.matcher(compiled(Schema(schema), strict=True))
        assert matcher.try_consume_tokens(list(text.encode())) < 30


@pytest.mark.parametrize(
    ("schema", "written", "other"),
    [
        (INTEGER, [str(MIN_INTEGER), str(MAX_INTEGER), "0", "-1"], [str(MAX_INTEGER + 1), "01", "-0", "1.0"]),
        (
            {"type": "number"},
            ["1.7976931348623157e308", "5e-324", "-0.0", "1E5", "0.1", str(MAX_INTEGER)],
            ["1e309", ".5", "1."],
        ),
        (
            {"type": "number", "exclusiveMinimum": 0.25},
            ["0.25000000000000006", "1e300"],
            ["0.25", "0.25000000000000001"],
        ),
        (
            {"type": "number", "minimum": MIN_INTEGER, "maximum": MIN_INTEGER},
            [str(MIN_INTEGER)],
            ["-9.223372036854776e18"],
        ),
        ({"type": "integer", "minimum": 2**70}, [str(2**70), str(10**99)], [str(2**70 - 1)]),
        ({"type": "integer", "maximum": -(2**70)}, [str(-(2**70))], ["0"]),
        ({"type": "number", "minimum": 10**400}, [], []),
        ({"type": "number", "maximum": -(10**400)}, [], []),
        ({"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3}, ["1", "2"], ["0", "3"]),
        ({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100}, ["0", "7", "98"], ["1", "105"]),
        ({"type": "integer", "multipleOf": 25}, ["0", "-25", "1075"], ["10", "5"]),
        ({"type": "number", "multipleOf": 0.25}, ["0.75", "-1", "2e20"], ["0.3", "0.125"]),
        ({"type": "number", "multipleOf": 0.3, "minimum": 0, "maximum": 1}, ["0.3", "0.9"], ["1", "0.1"]),
        ({"type": "number", "multipleOf": 3, "maximum": 9, "minimum": 3}, ["3", "9"], ["4.5", "12"]),
    ],
)
def test_numbers_are_written_within_their_bounds(schema: dict[str, Any], written: list[str], other: list[str]):
    if not written:
        with pytest.raises(SchemaRefused, match="no value"):
            compiled(Schema(schema), strict=True)
        return
    assert [text for text in written if not writes(schema, text)] == []
    assert [text for text in other if writes(schema, text)] == []
    for text in written:
        Schema(schema).validate(json.loads(text))


def test_patterns_of_whole_texts_compile():
    grammar = compiled_pattern("^(north|south) [0-9]{2}$|a*")
    assert lark.accepts(lark.matcher(grammar), "north 12")
    assert lark.accepts(lark.matcher(grammar), "")
    assert not lark.accepts(lark.matcher(grammar), "x north 12")
