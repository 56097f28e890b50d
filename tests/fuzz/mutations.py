"""Mutates valid inputs into hostile ones: cuts, repeats, splices, deep nesting, and tokens that break parsers."""

import json
import random
from collections.abc import Sequence
from typing import Any

_SALT = (
    *(b"[", b"{", b'"', b"}", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"\x00", b"\xff", b"\xed\xa0\x80"),
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400, b"18446744073709551616", b"1.0", b"null", b"true"),
    *(b"\n", b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8", b": ", b"data:", b"event: act", b"event: error"),
    *(b'"$ref":"#"', b'"$ref":"#/a"', b'"$dynamicRef":"#"', b'"$schema":"x"', b'"pattern":"("', b'"enum":[]'),
    *(b'"anyOf":[{}]', b'"type":"object"', b'"not":{}', b'"items":false', b'"required":["a"]', b'"uniqueItems":true'),
    *(b"Bearer ", b"ek_", b"_", b"=", b"[::1", b"%", b"//", b"@", b" ", b"\t"),
)


def mutated(generator: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Returns an input of the corpus after one to four mutations, cut to 4,096 bytes."""
    data = generator.choice(corpus)
    change = _changed_json if generator.random() < 0.5 else _changed_bytes
    for _ in range(generator.choice((1, 1, 2, 2, 3, 4))):
        data = change(generator, data, corpus)
    return data[:4096]


def _changed_bytes(generator: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at, end = sorted((generator.randrange(len(data) + 1), generator.randrange(len(data) + 1)))
    match generator.randrange(8):
        case 0:
            return data[:at] + data[end:]
        case 1:
            return data[:end] + data[at:]
        case 2:
            return data[:at] + generator.choice(_SALT) + data[at:]
        case 3:
            return data[:at] + generator.choice(_SALT) + data[end:]
        case 4:
            return data[:at] + bytes([generator.randrange(256)]) + data[at + 1 :]
        case 5:
            return data[:at] + generator.choice(corpus)[at:]
        case 6:
            depth = generator.choice((2, 20, 300, 1200))
            return b"[" * depth + data[:200] + b"]" * depth
        case _:
            return data[:at]


_NAMES = (
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "then", "properties", "required", "items"),
    *(
        "prefixItems",
        "additionalProperties",
        "patternProperties",
        "pattern",
        "format",
        "$ref",
        "$defs",
        "$id",
        "$anchor",
    ),
    *("minLength", "maxItems", "uniqueItems", "multipleOf", "contains", "dependentSchemas", "propertyNames", "a", ""),
    *("unevaluatedProperties", "minimum", "action_space", "actions", "schema", "observation", "step", "legal_actions"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1e308, 2**63, -(2**64), 0.1, "", "a", "\x00", "(a+)+$", "\ud800", "é" * 300),
    *([], {}, [[]], [{}], {"a": {}}, {"$ref": "#"}, {"$ref": "#/$defs/b"}, {"type": "string"}, ["string", "null"]),
    *("string", "object", "array", "integer", "#", "#/properties/a", "#/%zz", "http://x/y", ["a"], [1, 1.0, True]),
)


def _changed_json(generator: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Replaces, removes, copies or adds a value of a JSON document. Mutates the bytes if `data` is not JSON."""
    try:
        places = _places(root := [json.loads(data)])
        holder, key = generator.choice(places)
        match generator.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[generator.choice(_NAMES)] = generator.choice(_VALUES)
            case 2:
                other, name = generator.choice(places)
                holder[key] = json.loads(json.dumps(other[name]))
            case _:
                holder[key] = generator.choice(_VALUES)
        return json.dumps(root[0] if root else None).encode()
    except (ValueError, RecursionError):
        return _changed_bytes(generator, data, corpus)


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Returns each value's container, and its key or index in it."""
    found: list[tuple[Any, Any]] = []
    pending: list[Any] = [root]
    while pending:
        holder = pending.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                pending.append(holder[key])
    return found
