"""Reads the JSON schemas of callers, and validates values against them, with a limit on the computation."""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast
from urllib.parse import unquote

import jsonschema.validators
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import SchemaError, ValidationError
from referencing.exceptions import Unresolvable

from service.validation import formats
from service.validation.patterns import PatternRefused, matches

MAX_SCHEMA_BYTES = 64 * 1024
MAX_NESTING = 32
MAX_COMPARISONS = 100_000
_MAX_DEPTH = 120
"""Maximum number of nested keywords. Each takes up to five stack frames, and Python allows a thousand."""
_MAX_TARGET_BYTES = 2 * MAX_SCHEMA_BYTES
"""Maximum total size of the targets of references to places where no schema is expected."""
_CHARACTERS_A_COMPARISON = 8
"""Matching a pattern costs one comparison for this many characters."""

Node = dict[str, Any]
_NO_FORMATS = FormatChecker(())
"""The library would compile patterns with Python's `re`, whose syntax is another one."""


class SchemaRefused(ValueError):
    """The schema is invalid or not supported. The message says why."""


class SchemaMismatch(ValueError):
    """The value is not valid under the schema. The message says what does not match."""


@dataclass(slots=True)
class Budget:
    """The computation that validations may still use."""

    left: int = MAX_COMPARISONS
    """Number of comparisons. It is negative once a validation was stopped because it took too long."""


@dataclass(frozen=True, slots=True, eq=False)
class Subschema:
    """A schema within a schema. Equal subschemas at two places are two objects.

    place: where the value is that it describes: `a.b` for a property of a property, `a[]` for the items of an array.
    """

    schema: Node | bool
    place: str
    root: "Schema"
    index: int

    @property
    def keywords(self) -> Node:
        """The keywords; none if the schema is true or false."""
        return self.schema if isinstance(self.schema, dict) else {}

    def child(self, keyword: str, place: str = "") -> "Subschema":
        """Returns the subschema that is the value of a keyword."""
        return self.root.subschema(self.keywords[keyword], self.place + place)

    def children(self, keyword: str, place: str = "") -> "list[Subschema]":
        """Returns the subschemas that are listed under a keyword; none if it is missing."""
        return [self.root.subschema(schema, self.place + place) for schema in self.keywords.get(keyword, ())]

    def named(self, keyword: str, place: str | None = None) -> "dict[str, Subschema]":
        """Returns the subschemas under a keyword by their names. `place` is the same for all, if given."""
        children: Node = self.keywords.get(keyword, {})
        return {
            name: self.root.subschema(schema, _joined(self.place, name if place is None else place))
            for name, schema in children.items()
        }

    def where(self) -> str:
        """Returns the start of an error message: the place, and a colon."""
        return self.root.where(self.place)


class Schema:
    """A self-contained JSON schema (draft 2020-12). `text` is the schema as compact JSON.

    Keywords of older drafts that have another name today are translated: lists in `items`, `dependencies`, and boolean
    `exclusiveMinimum` and `exclusiveMaximum`.
    """

    def __init__(self, schema: Node, *, owner: str = "", noun: str = "property") -> None:
        """owner, noun: for error messages, for example "tool 'search'" and "parameter".

        Raises SchemaRefused if the schema is too large, nests too deeply, refers to another document, or is no schema.
        """
        self._owner, self._noun = owner, noun
        self._subschemas: dict[int, Subschema] = {}
        self._anchors: dict[str, Any] = {}
        self._known: set[int] = set()
        self._num_unchecked_bytes = _MAX_TARGET_BYTES
        self.text = json.dumps(schema, separators=(",", ":"))
        if len(self.text) > MAX_SCHEMA_BYTES:
            raise self._refused(f"the schema is {len(self.text)} bytes long; at most {MAX_SCHEMA_BYTES} are allowed")
        if _deeper_than(schema, MAX_NESTING):
            raise self._refused(f"the schema nests more than {MAX_NESTING} levels deep")
        self._schema: Node = _modern({name: value for name, value in schema.items() if name not in ("$schema", "$id")})
        try:
            Draft202012Validator.check_schema(self._schema, format_checker=_NO_FORMATS)
        except SchemaError as error:
            place, keyword = _place_of(list(error.absolute_path))
            raise SchemaRefused(
                f"{self.where(place)}not a JSON schema: {f'{keyword!r}: ' if keyword else ''}{_fault(error)}"
            ) from error
        _translate_pointers(self._schema, schema)
        self._check_references(self._schema, "")
        self._check_unevaluated()
        self._validator: Any = _Validator(self._schema)
        self.root = self.subschema(self._schema, "")

    def where(self, place: str) -> str:
        """Returns the start of an error message about a place: "tool 'search', parameter 'query': "."""
        parts = [self._owner] if self._owner else []
        if place:
            parts.append(f"{self._noun} {place[:200]!r}")
        return f"{', '.join(parts)}: " if parts else ""

    def subschema(self, schema: Node | bool, place: str) -> Subschema:
        """Returns the object for a part of the schema. The first place at which it is asked for is its place."""
        if isinstance(schema, bool):
            return Subschema(schema, place, self, -1)
        known = self._subschemas.get(id(schema))
        if known is None:
            known = self._subschemas[id(schema)] = Subschema(schema, place, self, len(self._subschemas))
        return known

    def resolve(self, part: Subschema) -> Subschema:
        """Returns the target of the part's `$ref`. Raises SchemaRefused if there is none."""
        reference: str = part.keywords["$ref"]
        target = self._anchors.get(reference[1:], self._schema)
        if reference[1:] not in self._anchors:
            pointer = unquote(reference[1:])
            if pointer and not pointer.startswith("/"):
                raise SchemaRefused(
                    f"{part.where()}'$ref': {reference[:100]!r} is not a JSON pointer or a known anchor"
                )
            for token in pointer.split("/")[1:]:
                target = _step(target, token.replace("~1", "/").replace("~0", "~"))
        if not isinstance(target, dict | bool):
            raise SchemaRefused(f"{part.where()}'$ref': {reference[:100]!r} has no target in the schema")
        if isinstance(target, dict) and id(cast("object", target)) not in self._known:
            self._check_target(part, reference, cast("Node", target))
        return self.subschema(cast("Node | bool", target), part.place)

    def validate(self, value: Any, part: Subschema | None = None, budget: Budget | None = None) -> None:
        """Validates a value under the schema or a part of it. Raises SchemaMismatch if the value is invalid, or if the
        validation exceeds the limit on computation.

        Several calls may share a budget. By default each call has its own.
        """
        validator = self._validator if part is None else self._validator.evolve(schema=part.schema)
        try:
            with _bounded(value, budget or Budget()):
                validator.validate(value)
        except _TooMuchWork as error:
            raise SchemaMismatch("validation takes too long: use a smaller value or a simpler schema") from error
        except ValidationError as error:
            raise SchemaMismatch(f"{_path(error.absolute_path)}{error.message}"[:500]) from error
        except PatternRefused as error:
            raise SchemaMismatch(str(error)[:500]) from error
        except Unresolvable as error:
            raise SchemaMismatch(f"a reference in the schema has no target: {error.ref}"[:500]) from error
        except (_TooDeep, RecursionError) as error:
            raise SchemaMismatch("the schema refers to itself without end, or the value nests too deeply") from error
        except ArithmeticError as error:
            raise SchemaMismatch(f"a number is too large to compare: {error}") from error

    def _refused(self, why: str) -> SchemaRefused:
        return SchemaRefused(f"{self.where('')}{why}")

    def _check_references(self, root: Node, place: str) -> None:
        """Checks the references in a schema, and remembers its subschemas."""
        for schema, where in _subschemas(root, place):
            self._known.add(id(schema))
            if schema is not root and ("$schema" in schema or "$id" in schema):
                keyword = "$schema" if "$schema" in schema else "$id"
                raise SchemaRefused(f"{self.where(where)}the keyword {keyword!r} is only supported at the top level")
            for keyword in ("$ref", "$dynamicRef"):
                if not schema.get(keyword, "#").startswith("#"):
                    raise SchemaRefused(
                        f"{self.where(where)}the keyword {keyword!r} refers to another document; "
                        "only references within the schema (#...) are supported"
                    )
            for keyword in ("$anchor", "$dynamicAnchor"):
                if keyword in schema:
                    self._anchors[schema[keyword]] = schema

    def _check_unevaluated(self) -> None:
        """Refuses unevaluatedProperties where the library would match patterns with Python's `re`, without a limit."""
        found = list(_subschemas(self._schema, ""))
        place = next((place for schema, place in found if "unevaluatedProperties" in schema), None)
        if place is not None and '"patternProperties"' in self.text:
            raise SchemaRefused(
                f"{self.where(place)}the keyword 'unevaluatedProperties' is not supported beside patternProperties"
            )

    def _check_target(self, part: Subschema, reference: str, target: Node) -> None:
        """Checks the target of a reference to a place where no schema is expected, such as OpenAPI's `components`."""
        self._num_unchecked_bytes -= len(json.dumps(target))
        if self._num_unchecked_bytes < 0:
            raise self._refused("the schema has too many references to places where no schema is expected")
        try:
            Draft202012Validator.check_schema(target, format_checker=_NO_FORMATS)
        except SchemaError as error:
            raise SchemaRefused(f"{part.where()}'$ref': {reference[:100]!r} is not a JSON schema") from error
        self._check_references(target, part.place)


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _step(node: Any, token: str) -> Any:
    """Follows one part of a JSON pointer; None if it leads nowhere."""
    if isinstance(node, list):
        items = cast("list[Any]", node)
        return items[int(token)] if token.isdigit() and len(token) < 10 and int(token) < len(items) else None
    return cast("Node", node).get(token) if isinstance(node, dict) else None


def _path(path: Any) -> str:
    """Returns the place of a value in an error message; empty for the whole value."""
    parts = [str(part) for part in path]
    return f"at {'.'.join(parts)[:100]}: " if parts else ""


_ONE_SCHEMA: dict[str, str | None] = {
    **{"not": None, "if": None, "then": None, "else": None, "propertyNames": None, "contentSchema": None},
    **{"items": "[]", "contains": "[]", "unevaluatedItems": "[]"},
    **{"additionalProperties": ".*", "unevaluatedProperties": ".*"},
}
"""Keywords whose value is a schema, and how the place of its values is written."""
_SCHEMAS_IN_ORDER = {"allOf": "", "anyOf": "", "oneOf": "", "prefixItems": "[]"}
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
_TYPES = "array, boolean, integer, null, number, object or string"


def _fault(error: SchemaError) -> str:
    """Returns what is wrong with the value of a keyword."""
    wanted: Any = error.validator_value
    match str(error.validator):
        case "type":
            must = f"be of type {' or '.join([wanted] if isinstance(wanted, str) else wanted)}"
        case "anyOf" | "enum":  # only the metaschema of `type` has alternatives
            must = f"be {_TYPES}, or a list of some of them"
        case "minItems":
            must = "not be empty"
        case "uniqueItems":
            must = "not contain a value twice"
        case "minimum":
            must = f"be at least {wanted}"
        case "exclusiveMinimum":
            must = f"be greater than {wanted}"
        case _:
            must = "have another form"
    return f"the value must {must}, but it is {json.dumps(error.instance, ensure_ascii=False)[:100]}"


_EVALUATING = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "dependentSchemas", "dependencies", "$dynamicRef", "contains"}
)
"""Keywords whose subschemas may evaluate properties or items of the same value."""


def _modern(schema: Any) -> Any:
    """Returns a copy of a schema without annotations, in which keywords of older drafts are translated to those of
    draft 2020-12."""
    if not isinstance(schema, dict):
        return schema
    found = _translated({name: value for name, value in cast("Node", schema).items() if name not in _ANNOTATIONS})
    for keyword, value in found.items():
        if keyword in _ONE_SCHEMA:
            found[keyword] = _modern(value)
        elif keyword in _SCHEMAS_IN_ORDER and isinstance(value, list):
            found[keyword] = [_modern(child) for child in cast("list[Any]", value)]
        elif keyword in _SCHEMAS_BY_NAME and isinstance(value, dict):
            found[keyword] = {name: _modern(child) for name, child in cast("Node", value).items()}
        elif keyword == "components" and isinstance(value, dict):  # of OpenAPI
            schemas = cast("Node", value).get("schemas")
            if isinstance(schemas, dict):
                children = {name: _modern(child) for name, child in cast("Node", schemas).items()}
                found[keyword] = {**cast("Node", value), "schemas": children}
    return found


def _translated(schema: Node) -> Node:
    """Translates the keywords of one schema, in place."""
    _translate_dynamic_references(schema)
    if isinstance(schema.get("items"), list):
        if first := schema.pop("items"):
            schema["prefixItems"] = first
        if "additionalItems" in schema:
            schema["items"] = schema.pop("additionalItems")
    for bound, keyword in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(keyword), bool) and schema.pop(keyword) and bound in schema:
            schema[keyword] = schema.pop(bound)
    for local, keyword in (("additionalProperties", "unevaluatedProperties"), ("items", "unevaluatedItems")):
        if keyword in schema and not schema.keys() & _EVALUATING:  # then the two mean the same
            schema[local] = schema.get(local, schema.pop(keyword))
            schema.pop(keyword, None)
    if isinstance(dependencies := schema.get("dependencies"), dict):
        del schema["dependencies"]
        for name, needed in cast("Node", dependencies).items():
            keyword = "dependentRequired" if isinstance(needed, list) else "dependentSchemas"
            schema[keyword] = {**schema.get(keyword, {}), name: needed}
    return schema


def _translate_dynamic_references(schema: Node) -> None:
    """Replaces references that depend on the document which they are reached from. Here there is only one document."""
    schema.pop("$recursiveAnchor", None)
    for keyword in ("$recursiveRef", "$dynamicRef"):
        if keyword in schema and "$ref" not in schema:
            schema["$ref"] = schema.pop(keyword)


def _translate_pointers(schema: Node, original: Node) -> None:
    """Makes the references of a translated schema lead to where those of the original lead."""
    for found, _ in _subschemas(schema, ""):
        if "tems" in found.get("$ref", ""):
            found["$ref"] = _new_pointer(found["$ref"], original)


def _new_pointer(reference: str, original: Node) -> str:
    """Returns a JSON pointer in which `items` and `additionalItems` are replaced by what they were translated to."""
    node: Any = original
    tokens = reference.split("/")
    for index, token in enumerate(tokens[1:], 1):
        if isinstance(node, dict) and isinstance(cast("Node", node).get("items"), list):
            tokens[index] = {"items": "prefixItems", "additionalItems": "items"}.get(token, token)
        node = _step(node, unquote(token).replace("~1", "/").replace("~0", "~"))
    return "/".join(tokens)


def _subschemas(schema: Any, place: str) -> Iterator[tuple[Node, str]]:
    """Yields all subschemas that are objects, with their places; the schema itself first."""
    pending: list[tuple[Any, str]] = [(schema, place)]
    while pending:
        node, place = pending.pop()
        if not isinstance(node, dict):
            continue
        found = cast("Node", node)
        yield found, place
        for keyword, value in found.items():
            if keyword in _ONE_SCHEMA:
                pending.append((value, place + (_ONE_SCHEMA[keyword] or "")))
            elif keyword in _SCHEMAS_IN_ORDER:
                pending += [(child, place + _SCHEMAS_IN_ORDER[keyword]) for child in value]
            elif keyword in _SCHEMAS_BY_NAME:
                pending += [(child, _joined(place, name)) for name, child in value.items()]


def _place_of(path: list[Any]) -> tuple[str, str]:
    """Returns the place and the keyword at the end of a path into a schema."""
    place, at = "", 0
    while at < len(path):
        keyword = path[at]
        if keyword in _SCHEMAS_BY_NAME and at + 1 < len(path):
            place = _joined(place, str(path[at + 1]))
            at += 2
        elif keyword in _SCHEMAS_IN_ORDER and at + 1 < len(path):
            place += _SCHEMAS_IN_ORDER[keyword]
            at += 2
        elif keyword in _ONE_SCHEMA and at + 1 < len(path):
            place += _ONE_SCHEMA[keyword] or ""
            at += 1
        else:
            return place, str(keyword)
    return place, ""


class _TooMuchWork(Exception):
    pass


class _TooDeep(Exception):
    pass


@dataclass(slots=True)
class _Work:
    """The state of one validation.

    sizes: the size of each list and object in the value, by its `id()`.
    depth: number of nested keywords that are being checked now.
    """

    budget: Budget
    sizes: dict[int, int]
    depth: int = 0


_work: ContextVar[_Work] = ContextVar("work")


@contextmanager
def _bounded(value: Any, budget: Budget) -> Generator[None]:
    sizes: dict[int, int] = {}
    _measure(value, sizes)
    token = _work.set(_Work(budget, sizes))
    try:
        yield
    finally:
        _work.reset(token)


def _measure(value: Any, sizes: dict[int, int]) -> int:
    if isinstance(value, str):
        return 1 + len(value) // 8
    if not isinstance(value, dict | list):
        return 1
    size = 1 + sum(_measure(child, sizes) for child in _children(value))
    sizes[id(cast("object", value))] = size
    return size


def _counted(check: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the check of a keyword so that it consumes the budget.

    A short schema with nested alternatives can take exponential time, and one episode must not block the others. The
    cost of a check grows with the length of the keyword's list, and with the size of the value, because an error
    message contains the value.
    """

    def counted(validator: Any, keyword_value: Any, instance: Any, schema: dict[str, Any]) -> Any:
        work = _work.get()
        list_length = len(cast("list[Any]", keyword_value)) if isinstance(keyword_value, list) else 0
        work.budget.left -= 1 + list_length + work.sizes.get(id(instance), 0) // 64
        if work.budget.left < 0:
            raise _TooMuchWork
        errors = check(validator, keyword_value, instance, schema)
        return _within(work, cast("Generator[ValidationError]", errors)) if isinstance(errors, Generator) else errors

    return counted


def _within(work: _Work, errors: Generator[ValidationError]) -> Generator[ValidationError]:
    """Limits the depth of nested keywords, which a schema that refers to itself would exceed.

    Python's recursion limit would be too late: the compiled part of the library (rpds) panics when it is reached, with
    an exception that is not derived from Exception.
    """
    work.depth += 1
    try:
        if work.depth > _MAX_DEPTH:
            raise _TooDeep
        yield from errors
    finally:
        work.depth -= 1


def _unique_items(validator: Any, required: Any, instance: Any, schema: dict[str, Any]) -> Generator[ValidationError]:
    """Checks `uniqueItems` in linear time. The library's check compares each item with every other item."""
    if required and isinstance(instance, list):
        items = cast("list[Any]", instance)
        if len({_identity(item) for item in items}) < len(items):
            yield ValidationError(f"{str(items)[:100]} has non-unique elements")


def _identity(value: Any) -> Any:
    """Returns a hashable key. Keys are equal if JSON Schema treats the values as equal: 1 and 1.0, not 1 and true."""
    if isinstance(value, dict):
        return "object", frozenset((key, _identity(item)) for key, item in cast("dict[str, Any]", value).items())
    if isinstance(value, list):
        return "array", tuple(_identity(item) for item in cast("list[Any]", value))
    return isinstance(value, bool), value


def _matches(pattern: str, text: str, *, searches: bool = True) -> bool:
    """Matches a pattern in linear time. Python's own matcher can take exponential time, so it must not be used."""
    _work.get().budget.left -= 1 + len(text) // _CHARACTERS_A_COMPARISON
    return matches(pattern, text, searches=searches)


def _pattern(_: Any, pattern: str, instance: Any, __: Node) -> Generator[ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError(f"{instance[:100]!r} does not match {pattern!r}")


def _format(_: Any, name: str, instance: Any, __: Node) -> Generator[ValidationError]:
    pattern = formats.PATTERNS.get(name)
    if isinstance(instance, str) and pattern is not None and not _matches(pattern, instance, searches=False):
        yield ValidationError(f"{instance[:100]!r} is not a {name!r}")


def _multiple_of(_: Any, divisor: float, instance: Any, __: Node) -> Generator[ValidationError]:
    """Checks the decimal numbers that were written. The library divides floats: 0.07 would be no multiple of 0.01."""
    is_number = isinstance(instance, int | float) and not isinstance(instance, bool)
    if is_number and (Fraction(repr(instance)) / Fraction(repr(divisor))).denominator != 1:
        yield ValidationError(f"{instance!r} is not a multiple of {divisor!r}")


def _pattern_properties(validator: Any, patterns: Node, instance: Any, _: Node) -> Generator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, child in patterns.items():
            for name, value in cast("Node", instance).items():
                if _matches(pattern, name):
                    yield from validator.descend(value, child, path=name, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Node) -> Generator[ValidationError]:
    if isinstance(instance, dict):
        for name, value in cast("Node", instance).items():
            if name in schema.get("properties", {}):
                continue
            if any(_matches(pattern, name) for pattern in schema.get("patternProperties", {})):
                continue
            if allowed is False:
                yield ValidationError(f"the property {name[:100]!r} is not allowed")
            else:
                yield from validator.descend(value, allowed, path=name)


_KNOWN: dict[str, Callable[..., Any]] = cast("Any", Draft202012Validator).VALIDATORS
_KEYWORDS = {
    **_KNOWN,
    "pattern": _pattern,
    "format": _format,
    "multipleOf": _multiple_of,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "uniqueItems": _unique_items,
}
_Validator: Any = cast("Any", jsonschema.validators).extend(
    Draft202012Validator, {name: _counted(check) for name, check in _KEYWORDS.items()}
)


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(cast("Node", node).values())
    return cast("list[Any]", node) if isinstance(node, list) else []
