"""Draws JSON schemas and values, and checks that the grammar of a schema derives exactly the valid values.

jsonschema-rs is the judge. It shares no code with the service. The grammar is followed byte by byte, without a model.
"""

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import jsonschema_rs

from service.engine.json_grammar import compiled
from service.validation import lark
from service.validation.formats import PATTERNS as FORMATS
from service.validation.json_schema import Schema, SchemaMismatch, SchemaRefused

_LETTERS = 'ab"\\\n/é😀 1'
_TEXTS = (
    *(
        "",
        "a",
        "b",
        "ab",
        "aab",
        "abc",
        '"',
        'a"b',
        "\\",
        "a\\b",
        "\n",
        "é",
        "😀a",
        "x-1",
        "x-",
        "a.py",
        ".py",
        "12",
        "1",
    ),
    *("main", "dev", "https://a.b/c", "2025-02-28", "2024-02-29", "10:20:30Z", "2025-01-02T03:04:05Z", "P1D", "a@b.c"),
    *("127.0.0.1", "::1", "12345678-1234-1234-1234-123456789abc", "urn:x:y", "/a/~0", "\x7f", "\u2028", "\x00"),
)
_PATTERNS = (
    *(
        r"^a",
        r"b$",
        "^a+$",
        r"\.py$",
        "^https://",
        "^x-",
        "a|^b$",
        r"^[^\"]*$",
        r'[\\"]',
        r"^\d{1,3}$",
        r"^\w+$",
        r"\s",
    ),
    *("^(main|dev)$", "^(?!main$)(main|dev)$", "^(?=.*a)(?=.*b).{2,4}$", "^.{2}$", "^$", "", "^(a|b)*$", "(^a|b$)"),
    *(r"^[a-c]?[é😀]", r"^[^a]+$", "^2025-", r"^\u0061", r"\/", "^(?:a{2}){1,2}$", r"^[\w.-]+$", r"[^\x00-\x1f]$"),
)
_NAMES = ("a", "b", "c", "x-1", "x-2", "é", 'q"')
_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    5,
    10,
    0.5,
    0.25,
    -1.5,
    1.0,
    1e-7,
    1e20,
    -3e100,
    99,
    100,
    0.01,
    0.3,
    2**53,
)
_MULTIPLES = (1, 2, 3, 5, 10, 0.5, 0.25, 0.1, 0.01, 7, 1.5)


@dataclass
class Counts:
    """What a campaign has found."""

    drawn: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])
    written: int = 0
    valid: int = 0
    violations: list[str] = field(default_factory=list[str])
    unreachable: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        refused = ", ".join(f"{name} {count}" for name, count in self.refused.most_common())
        return (
            f"schemas: {self.drawn} drawn, {self.accepted} accepted, {sum(self.refused.values())} refused ({refused}); "
            f"{self.written} texts written: {len(self.violations)} violations; "
            f"{self.valid} valid values: {len(self.unreachable)} unreachable"
        )


# --- Schemas ---


def drawn_schema(generator: random.Random) -> dict[str, Any]:
    """Returns a random schema, which may be recursive."""
    maker = _Maker(generator)
    schema = maker.schema(3)
    if isinstance(schema, bool):
        schema = {"allOf": [schema]}
    if maker.uses_references:
        schema["$defs"] = {"d": maker.schema(2), "e": maker.schema(1), "tree": _TREE}
    return schema


_TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 3}, "next": {"$ref": "#/$defs/tree"}},
    "required": ["v"],
    "additionalProperties": False,
}


class _Maker:
    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        self.uses_references = False

    def schema(self, depth: int) -> Any:
        choose = self._random
        if choose.random() < 0.04:
            return choose.choice((True, False, {}))
        kinds = [self._string, self._number, self._number, self._values, self._string, self._untyped]
        if depth:
            kinds += [
                self._object,
                self._object,
                self._object,
                self._array,
                self._array,
                self._combined,
                self._reference,
            ]
        schema = choose.choice(kinds)(depth - 1)
        if choose.random() < 0.1:
            schema["description"] = "d"
        return schema

    def _maybe(self, schema: dict[str, Any], share: float, name: str, value: Any) -> None:
        if self._random.random() < share:
            schema[name] = value() if callable(value) else value

    def _string(self, _: int) -> dict[str, Any]:
        choose = self._random
        schema: dict[str, Any] = {"type": "string"}
        self._maybe(schema, 0.4, "pattern", lambda: choose.choice(_PATTERNS))
        self._maybe(schema, 0.2, "minLength", lambda: choose.randrange(4))
        self._maybe(schema, 0.2, "maxLength", lambda: choose.randrange(6))
        self._maybe(schema, 0.15, "format", lambda: choose.choice((*FORMATS, "password", "regex")))
        return schema

    def _number(self, _: int) -> dict[str, Any]:
        choose = self._random
        schema: dict[str, Any] = {"type": choose.choice(("integer", "number"))}
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            self._maybe(schema, 0.2, name, lambda: choose.choice(_NUMBERS))
        self._maybe(schema, 0.15, "multipleOf", lambda: choose.choice(_MULTIPLES))
        return schema

    def _values(self, _: int) -> dict[str, Any]:
        choose = self._random
        values = [choose.choice((*_TEXTS, *_NUMBERS, None, True, False, [], [1], {}, {"a": 1})) for _ in range(3)]
        schema: dict[str, Any] = {"enum": values} if choose.random() < 0.7 else {"const": values[0]}
        self._maybe(schema, 0.2, "type", lambda: choose.choice(("string", "number", "integer", "object")))
        self._maybe(schema, 0.1, "pattern", lambda: choose.choice(_PATTERNS))
        return schema

    def _untyped(self, _: int) -> dict[str, Any]:
        choose = self._random
        keywords: list[tuple[str, Any]] = [
            *(
                ("minLength", 2),
                ("maximum", 3),
                ("required", ["a"]),
                ("maxItems", 1),
                ("pattern", "^a"),
                ("minProperties", 1),
            ),
            *(("type", ["string", "null"]), ("type", ["integer", "object"]), ("not", {"type": "string"})),
            *(("not", {"enum": ["a", None]}), ("uniqueItems", True), ("contains", {"const": 1})),
            *(("if", {"type": "string"}), ("then", {"maxLength": 2}), ("dependentRequired", {"a": ["b"]})),
            *(("not", {"required": ["a"]}), ("nullable", True), ("x-order", 3), ("example", "e")),
        ]
        return dict(choose.sample(keywords, choose.randrange(3)))

    def _object(self, depth: int) -> dict[str, Any]:
        choose = self._random
        names = choose.sample(_NAMES, choose.randrange(4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        self._maybe(schema, 0.5, "required", lambda: choose.sample(names, choose.randrange(len(names) + 1)))
        self._maybe(schema, 0.05, "required", ["z"])
        self._maybe(schema, 0.6, "additionalProperties", lambda: choose.choice((False, False, self.schema(depth))))
        patterns = ("^x-", "1$", "^[a-c]$", "é")
        self._maybe(
            schema, 0.15, "patternProperties", lambda: {choose.choice(patterns): self.schema(depth) for _ in "ab"}
        )
        self._maybe(schema, 0.1, "minProperties", lambda: choose.randrange(4))
        self._maybe(schema, 0.1, "maxProperties", lambda: choose.randrange(4))
        self._maybe(
            schema, 0.05, "propertyNames", lambda: choose.choice(({"pattern": "^[a-cx]"}, {"enum": ["a", "k"]}))
        )
        self._maybe(schema, 0.05, "unevaluatedProperties", False)
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        choose = self._random
        schema: dict[str, Any] = {"type": "array"}
        self._maybe(schema, 0.7, "items", lambda: self.schema(depth))
        self._maybe(schema, 0.3, "prefixItems", lambda: [self.schema(depth) for _ in range(choose.randrange(1, 3))])
        self._maybe(schema, 0.3, "minItems", lambda: choose.randrange(3))
        self._maybe(schema, 0.3, "maxItems", lambda: choose.randrange(4))
        self._maybe(schema, 0.05, "uniqueItems", True)
        return schema

    def _combined(self, depth: int) -> dict[str, Any]:
        choose = self._random
        keyword = choose.choice(("anyOf", "anyOf", "oneOf", "allOf"))
        schema = {keyword: [self.schema(depth) for _ in range(choose.randrange(1, 4))]}
        if choose.random() < 0.4 and isinstance(beside := self.schema(depth), dict):
            schema = {**beside, **schema}
        return schema

    def _reference(self, depth: int) -> dict[str, Any]:
        self.uses_references = True
        target = self._random.choice(("#/$defs/d", "#/$defs/e", "#/$defs/tree", "#"))
        schema: dict[str, Any] = {"$ref": target}
        if self._random.random() < 0.3 and isinstance(beside := self.schema(0), dict):
            schema = {**beside, **schema}
        return schema


# --- Values ---


class _Valuer:
    """Draws values that are often valid. It knows JSON Schema, but nothing of the grammar."""

    def __init__(self, generator: random.Random, root: dict[str, Any]) -> None:
        self._random = generator
        self._root = root

    def value(self, schema: Any, depth: int) -> Any:
        choose = self._random
        if not isinstance(schema, dict) or depth <= 0 or choose.random() < 0.05:
            return self.anything(depth)
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in schema and choose.random() < 0.8:
                return self.value(self._applied(schema, keyword), depth - 1)
        if "enum" in schema or "const" in schema:
            return choose.choice(schema.get("enum") or [schema.get("const")])
        kind = schema.get("type") or choose.choice(("string", "number", "object", "array", "null", "boolean"))
        kind = choose.choice(kind) if isinstance(kind, list) else kind
        if kind in ("object", "array"):
            return self._object(schema, depth) if kind == "object" else self._array(schema, depth)
        makers = {"string": self._string, "integer": self._integer, "number": self._number}
        return makers[kind](schema) if kind in makers else choose.choice((True, False)) if kind == "boolean" else None

    def _applied(self, schema: dict[str, Any], keyword: str) -> Any:
        """Returns the schema that a value should fit because of a keyword."""
        if keyword == "$ref":
            target: Any = self._root
            for token in schema["$ref"].split("/")[1:]:
                target = target[token]
            return target
        picked = self._random.choice(schema[keyword])
        if keyword != "allOf" or not isinstance(picked, dict):
            return picked
        return {name: value for name, value in schema.items() if name != keyword} | picked

    def anything(self, depth: int) -> Any:
        choose = self._random
        simple = (*_TEXTS, *_NUMBERS, None, True, False)
        if depth > 0 and choose.random() < 0.3:
            if choose.random() < 0.5:
                return [self.anything(depth - 1) for _ in range(choose.randrange(3))]
            return {choose.choice((*_NAMES, *_TEXTS)): self.anything(depth - 1) for _ in range(choose.randrange(3))}
        return choose.choice(simple)

    def _string(self, _: dict[str, Any]) -> str:
        choose = self._random
        if choose.random() < 0.6:
            return choose.choice(_TEXTS)
        return "".join(choose.choice(_LETTERS) for _ in range(choose.randrange(6)))

    def _number(self, schema: dict[str, Any]) -> Any:
        choose = self._random
        bounds = [schema[name] for name in schema if "imum" in name and not isinstance(schema[name], bool)]
        near = [bound + step for bound in bounds for step in (0, 1, -1, 0.5, 1e-9)]
        near += [math.nextafter(float(bound), way) for bound in bounds for way in (math.inf, -math.inf)]
        if "multipleOf" in schema:
            near += [schema["multipleOf"] * choose.randrange(-20, 20), schema["multipleOf"] * 10 ** choose.randrange(6)]
        return choose.choice(
            [
                *near,
                choose.uniform(-10, 10),
                choose.choice(_NUMBERS),
                choose.random() * 10.0 ** choose.randrange(-300, 300),
            ]
        )

    def _integer(self, schema: dict[str, Any]) -> int:
        number = self._number(schema)
        return int(number) if abs(number) < 1e18 else int(math.copysign(10**18, number))

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        choose = self._random
        found: dict[str, Any] = {}
        properties: dict[str, Any] = schema.get("properties", {})
        required: list[str] = schema.get("required", [])
        for name in dict.fromkeys([*properties, *required]):
            if name in required or choose.random() < 0.6:
                found[name] = self.value(properties.get(name, schema.get("additionalProperties", True)), depth - 1)
        for _ in range(choose.choice((0, 0, 1, 2))):
            name = choose.choice((*_NAMES, "z", "k", "x-9", "", "b1"))
            matching = [
                child for pattern, child in schema.get("patternProperties", {}).items() if re.search(pattern, name)
            ]
            found.setdefault(
                name, self.value(choose.choice(matching or [schema.get("additionalProperties", True)]), depth - 1)
            )
        names = list(found)
        choose.shuffle(names)
        return {name: found[name] for name in names}

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        first = schema.get("prefixItems", [])
        low, high = schema.get("minItems", 0), schema.get("maxItems", 4)
        length = self._random.randrange(low, max(high, low) + 1)
        return [
            self.value(first[index] if index < len(first) else schema.get("items", True), depth - 1)
            for index in range(length)
        ]


# --- The grammar ---


def written(grammar: str, generator: random.Random) -> str | None:
    """Follows a grammar at random. Returns the text, or None if it did not end soon."""
    matcher = lark.matcher(grammar)
    text = bytearray()
    for length in range(800):
        if matcher.is_accepting() and (length > 200 or generator.random() < 0.3):
            return text.decode()
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
        if not allowed:
            return text.decode() if matcher.is_accepting() else None
        ends = [byte for byte in allowed if byte in b'"]}']
        byte = generator.choice(ends if ends and generator.random() < 0.1 + length / 100 else allowed)
        text.append(byte)
        assert matcher.consume_token(byte)
    return None


def can_write(grammar: str, value: Any) -> bool:
    """Whether a grammar derives a text of the value."""
    return any(matcher.is_accepting() for matcher in _after(value, lark.matcher(grammar)))


def _after(value: Any, matcher: Any) -> Iterator[Any]:
    """Yields the matchers after a text of the value."""
    if isinstance(value, dict):
        for opened in _consumed(matcher, "{"):
            yield from _after_properties(value, opened, first=True)
    elif isinstance(value, list):
        states = _consumed(matcher, "[")
        for index, item in enumerate(value):
            states = [
                after
                for state in states
                for comma in _consumed(state, "," if index else "")
                for after in _after(item, comma)
            ]
        for state in states:
            yield from _consumed(state, "]")
    else:
        for text in _texts(value):
            yield from _consumed(matcher, text)


def _after_properties(left: dict[str, Any], matcher: Any, *, first: bool) -> Iterator[Any]:
    if not left:
        yield from _consumed(matcher, "}")
    for name, value in left.items():
        key = ("" if first else ",") + json.dumps(name, ensure_ascii=False) + ":"
        rest = {other: left[other] for other in left if other != name}
        for keyed in _consumed(matcher, key):
            for after in _after(value, keyed):
                yield from _after_properties(rest, after, first=False)


def _texts(value: Any) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [json.dumps(value, ensure_ascii=False)]
    texts = {repr(value)}
    if float(value) == value and abs(value) < 2**70:
        texts |= {repr(float(value)), f"{float(value):.16e}"}
    if value == int(value):
        texts.add(str(int(Decimal(repr(value)))))  # the number that the JSON text of the value denotes
    return sorted(texts)


def _consumed(matcher: Any, text: str) -> list[Any]:
    copy = matcher.deep_copy()
    return [copy] if not text or copy.consume_tokens(list(text.encode())) else []


# --- The check ---

_BY_KEYWORD = re.compile(r"the keyword '([$\w]+)'")


def check(generator: random.Random, counts: Counts, *, num_values: int = 12) -> None:
    """Draws a schema, and compares its grammar with the judge."""
    schema = drawn_schema(generator)
    counts.drawn += 1
    try:
        judge = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
        ours = Schema(schema)
        grammar = compiled(ours, strict=True)
    except SchemaRefused as refusal:
        keyword = _BY_KEYWORD.search(str(refusal))
        reason = keyword.group(1) if keyword else "other"
        if "no value is valid" in str(refusal):
            reason = "no valid value"
            _check_impossible(schema, generator, counts, num_values)
        elif "without end" in str(refusal):
            reason = "endless reference"
        counts.refused[reason] += 1
        return
    counts.accepted += 1
    for _ in range(num_values):
        text = written(grammar, generator)
        if text is not None:
            counts.written += 1
            value = json.loads(text)
            if not judge.is_valid(value) or not _is_valid(ours, value):
                counts.violations.append(f"{json.dumps(schema)} writes {text}")
    for value in _valid_values(schema, judge, generator, num_values):
        counts.valid += 1
        if not _is_valid(ours, value):
            counts.unreachable.append(f"{json.dumps(schema)} is said to forbid {json.dumps(value)}")
        elif not can_write(grammar, value):
            counts.unreachable.append(f"{json.dumps(schema)} cannot write {json.dumps(value)}")


def _check_impossible(schema: dict[str, Any], generator: random.Random, counts: Counts, num_values: int) -> None:
    judge = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    for value in itertools.islice(_valid_values(schema, judge, generator, num_values), 1):
        counts.unreachable.append(f"{json.dumps(schema)} is said to forbid all values, but not {json.dumps(value)}")


def _valid_values(schema: dict[str, Any], judge: Any, generator: random.Random, num_values: int) -> Iterator[Any]:
    valuer = _Valuer(generator, schema)
    bounds_integers = bool(re.search(r'"integer"|"multipleOf"', json.dumps(schema)))
    for _ in range(num_values * 2):
        value = valuer.value(schema, 5)
        if judge.is_valid(value) and not (bounds_integers and _has_large_integer(value)):
            yield value


def _has_large_integer(value: Any) -> bool:
    """Whether a value has a whole number of more than 64 bits, which is documented not to be written as an integer."""
    if isinstance(value, dict | list):
        return any(map(_has_large_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and abs(value) >= 2**63 and value == int(value)


def _is_valid(schema: Schema, value: Any) -> bool:
    try:
        schema.validate(value)
    except SchemaMismatch:
        return False
    return True


def campaign(num_schemas: int, seed: int) -> Counts:
    """Checks this many schemas."""
    counts = Counts()
    for number in range(num_schemas):
        check(random.Random(f"{seed}/schema/{number}"), counts)
    return counts
