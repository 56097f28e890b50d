"""Schemas that people have: of pydantic, zod, OpenAPI and MCP servers. Each is enforced, or refused by keyword.

The values are matched against the grammar, byte by byte. Values are given in the order of the schema's properties.
"""

import datetime
import enum
import json
import pathlib
import uuid
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, HttpUrl, SecretStr, conint, constr

from service.agent.action_spaces import ToolsSpace
from service.engine.base import ActionSpaceRefused
from service.validation import lark


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(9, ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str = Field(max_length=8)


class Tree(BaseModel):
    value: int
    children: "list[Tree]" = []


class Filter(BaseModel):
    any_of: "list[Filter] | None" = None
    field: str | None = None


def model(**fields: Any) -> dict[str, Any]:
    """Returns pydantic's schema of a model with fields of these types."""
    return type("Model", (BaseModel,), {"__annotations__": fields, "__module__": __name__}).model_json_schema()


def of(name: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False, **more}


UUID = "12345678-1234-1234-1234-123456789abc"
ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"

ENFORCED: list[tuple[str, dict[str, Any], list[Any], list[Any]]] = [
    ("HttpUrl", model(v=HttpUrl), [{"v": "https://a.b/c?d=e"}], [{"v": "a b"}, {"v": ""}]),
    ("Path", model(v=pathlib.Path), [{"v": "/x/y"}], [{"v": 1}]),
    ("SecretStr", model(v=SecretStr), [{"v": "s"}], [{"v": None}]),
    ("bytes", model(v=bytes), [{"v": "abc"}], [{"v": 1}]),
    (
        "Decimal",
        of("v", {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]}),
        [{"v": "-1.50"}, {"v": 1.5}],
        [{"v": "1.5.5"}, {"v": "-"}],
    ),
    ("datetime", model(v=datetime.datetime), [{"v": "2024-02-29T10:00:00Z"}], [{"v": "2023-02-29T10:00:00Z"}]),
    ("date", model(v=datetime.date), [{"v": "2025-01-31"}], [{"v": "2025-04-31"}]),
    ("time", model(v=datetime.time), [{"v": "10:00:00Z"}], [{"v": "25:00:00Z"}]),
    ("timedelta", model(v=datetime.timedelta), [{"v": "P1DT2H"}], [{"v": "1 day"}]),
    ("UUID", model(v=uuid.UUID), [{"v": UUID}], [{"v": UUID[:-1]}]),
    ("Enum", model(v=Color), [{"v": "red"}], [{"v": "green"}]),
    ("Literal", model(v=Literal["a", 1, None]), [{"v": "a"}, {"v": 1}, {"v": None}], [{"v": "b"}]),
    ("Optional", model(v=int | None), [{"v": None}, {"v": 3}], [{"v": "3"}]),
    ("Union", model(v=int | str), [{"v": 3}, {"v": "3"}], [{"v": None}, {"v": 1.5}]),
    (
        "discriminated union",
        model(v=Annotated[Cat | Dog, Field(discriminator="kind")]),
        [{"v": {"kind": "cat", "lives": 3}}, {"v": {"kind": "dog", "name": "rex"}}],
        [
            {"v": {"kind": "cat", "lives": 10}},
            {"v": {"kind": "cow"}},
            {"v": {"kind": "dog", "name": "too long a name"}},
        ],
    ),
    ("nested", model(v=list[Cat]), [{"v": []}, {"v": [{"kind": "cat"}]}], [{"v": [{"kind": "dog"}]}]),
    ("recursive", Tree.model_json_schema(), [{"value": 1, "children": [{"value": 2}]}], [{"children": []}]),
    ("nested filters", Filter.model_json_schema(), [{"any_of": [{"field": "a"}, {"any_of": []}]}], [{"any_of": [1]}]),
    ("constr", model(v=constr(pattern="^[a-z]+$", max_length=5)), [{"v": "abc"}], [{"v": "abcdef"}, {"v": "A"}]),
    ("conint", model(v=conint(ge=0, multiple_of=5)), [{"v": 10}, {"v": 0}], [{"v": 11}, {"v": -5}]),
    ("gt and lt", model(v=Annotated[float, Field(gt=0, lt=1)]), [{"v": 0.5}, {"v": 1e-9}], [{"v": 0}, {"v": 1}]),
    ("tuple", model(v=tuple[int, str]), [{"v": [1, "a"]}], [{"v": [1]}, {"v": ["a", 1]}, {"v": [1, "a", 2]}]),
    ("dict", model(v=dict[str, int]), [{"v": {}}, {"v": {"a": 1, "b": 2}}], [{"v": {"a": "s"}}]),
    ("dict of literals", model(v=dict[Literal["a", "b"], int]), [{"v": {"a": 1}}], [{"v": {"c": 1}}]),
    ("dict of patterns", model(v=dict[constr(pattern="^x-"), int]), [{"v": {"x-a": 1}}], [{"v": {"x-a": "s"}}]),
    ("Any", model(v=Any), [{"v": [None, {"a": 1.5}]}], [{}]),
    (
        "zod e-mail",
        of("v", {"type": "string", "format": "email", "pattern": ZOD_EMAIL}),
        [{"v": "a.b@c.de"}],
        [{"v": "a..b@c.de"}],
    ),
    (
        "zod regex and max",
        of("v", {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5}),
        [{"v": "ab"}],
        [{"v": ""}],
    ),
    ("zod endsWith", of("v", {"type": "string", "pattern": ".*\\.py$"}), [{"v": "a.py"}], [{"v": "a.pyx"}]),
    (
        "zod object",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            **of("v", {"type": "string", "minLength": 1, "format": "email"}),
        },
        [{"v": "a@b.c"}],
        [{"v": ""}],
    ),
    (
        "zod tuple (draft 7)",
        of("v", {"type": "array", "items": [{"type": "number"}], "additionalItems": False}),
        [{"v": [1.5]}],
        [{"v": [1, 2]}],
    ),
    (
        "zod record",
        of("v", {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}}),
        [{"v": {"a": 1}}],
        [{"v": 1}],
    ),
    (
        "zod union",
        of("v", {"anyOf": [{"type": "string"}, {"type": "number"}, {"not": {}}]}),
        [{"v": 1.5}, {"v": "a"}],
        [{"v": None}],
    ),
    (
        "zod positive",
        of("v", {"type": "integer", "exclusiveMinimum": 0, "maximum": 2**53 - 1}),
        [{"v": 1}],
        [{"v": 0}, {"v": 2**53}],
    ),
    (
        "OpenAPI annotations",
        {
            "type": "object",
            "properties": {
                "v": {"$ref": "#/components/schemas/Id", "example": 3, "nullable": True, "x-order": 1, "readOnly": True}
            },
            "components": {"schemas": {"Id": {"type": "integer", "format": "int64"}}},
        },
        [{"v": 3}],
        [{"v": None}],
    ),
    ("OpenAPI 3.0 bounds", of("v", {"type": "number", "minimum": 0, "exclusiveMinimum": True}), [{"v": 1}], [{"v": 0}]),
    (
        "allOf of two models",
        {
            "allOf": [
                of("a", {"type": "integer"}, additionalProperties=True),
                {"properties": {"b": {"type": "string"}}, "required": ["b"]},
            ]
        },
        [{"a": 1, "b": "x"}],
        [{"a": 1}, {"b": "x"}],
    ),
    (
        "required in anyOf",
        {
            "properties": {"id": {"type": "integer"}, "name": {"type": "string"}},
            "anyOf": [{"required": ["id"]}, {"required": ["name"]}],
        },
        [{"id": 1}, {"name": "a"}],
        [{}],
    ),
    ("MCP without type", {"properties": {"path": {"type": "string"}}, "required": ["path"]}, [{"path": "/"}], [{}]),
    ("MCP empty", {}, [{}, {"a": 1}], []),
    (
        "format beside pattern",
        of("v", {"type": "string", "format": "date", "pattern": "^2025-"}),
        [{"v": "2025-01-02"}],
        [{"v": "2024-01-02"}, {"v": "2025-99-99"}],
    ),
    (
        "ipv4 or ipv6",
        of("v", {"oneOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]}),
        [{"v": "1.2.3.4"}, {"v": "::1"}],
        [{"v": "x"}],
    ),
    ("price", of("v", {"type": "number", "minimum": 0, "multipleOf": 0.01}), [{"v": 9.99}, {"v": 10}], [{"v": 0.005}]),
    ("quotes in a pattern", of("v", {"type": "string", "pattern": '^[^"]*$'}), [{"v": "a\\b\n"}], [{"v": 'a"b'}]),
    ("not a value", of("v", {"type": "string", "not": {"enum": ["main"]}}), [{"v": "mains"}], [{"v": "main"}]),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("set", model(v=set[str]), "uniqueItems"),
    ("multiple of 7", model(v=conint(multiple_of=7)), "multipleOf"),
    ("if", of("v", {"type": "string", "if": {"const": "a"}, "then": {"maxLength": 1}}), "if"),
    ("not", of("v", {"type": "string", "not": {"pattern": "x"}}), "not"),
    ("contains", of("v", {"type": "array", "contains": {"const": 1}}), "contains"),
    ("overlapping oneOf", of("v", {"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf"),
    ("dependencies", of("v", {"type": "object", "dependencies": {"a": ["b"]}}), "dependentRequired"),
    ("idn-email", of("v", {"type": "string", "format": "idn-email"}), "format"),
    ("lookbehind", of("v", {"type": "string", "pattern": "(?<=a)b"}), "pattern"),
    ("key pattern", of("v", {"type": "object", "patternProperties": {"\\bx": {}}}), "patternProperties"),
    ("many properties", of("v", {"type": "object", "minProperties": 2}), "minProperties"),
    (
        "unevaluated",
        of("v", {"type": "object", "anyOf": [{}], "unevaluatedProperties": False}),
        "unevaluatedProperties",
    ),
]


def _space(schema: dict[str, Any], **more: Any) -> ToolsSpace:
    return ToolsSpace.of({"tools": [{"name": "tool", "parameters": schema}], **more})


def _writes(space: ToolsSpace, arguments: Any) -> bool:
    call = json.dumps({"name": "tool", "arguments": arguments}, ensure_ascii=False, separators=(",", ":"))
    return lark.accepts(lark.matcher(space.grammar), call)


def _records(space: ToolsSpace, arguments: Any) -> bool:
    try:
        space.write({"name": "tool", "arguments": arguments})
    except ActionSpaceRefused:
        return False
    return True


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"), [case[1:] for case in ENFORCED], ids=[case[0] for case in ENFORCED]
)
def test_a_schema_that_people_have_is_enforced_exactly(schema: dict[str, Any], valid: list[Any], invalid: list[Any]):
    space = _space(schema)
    for arguments in valid:
        assert _writes(space, arguments), f"{arguments} cannot be written"
        assert _records(space, arguments), f"{arguments} cannot be recorded"
    for arguments in invalid:
        assert not _writes(space, arguments), f"{arguments} can be written"
        assert not _records(space, arguments), f"{arguments} can be recorded"


@pytest.mark.parametrize(("schema", "keyword"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_enforced_is_refused_naming_tool_parameter_and_keyword(schema: dict[str, Any], keyword: str):
    with pytest.raises(ActionSpaceRefused) as refusal:
        _space(schema)
    for word in ("tool 'tool'", "parameter 'v", f"'{keyword}'"):
        assert word in str(refusal.value)
