"""Owns JSON schemas as callers give them: which are accepted, and whether a value is valid, in bounded work."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import jsonschema.validators
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing.exceptions import Unresolvable

MAX_SCHEMA_BYTES = 64 * 1024
MAX_NESTING = 32
MAX_COMPARISONS = 100_000
_MAX_DEPTH = 120
"""Keywords within each other; each takes up to five frames of the thousand that Python has."""


class SchemaRefused(ValueError):
    """The schema cannot be served; the message says why."""


class SchemaMismatch(ValueError):
    """The value is not valid under the schema; the message says where."""


class Schema:
    """A JSON schema (draft 2020-12) that stands on its own. Raises SchemaRefused for one that is too large, nests too
    deeply, refers to another document, or is not a schema. `text` is the schema as compact JSON."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.text = json.dumps(schema, separators=(",", ":"))
        if len(self.text) > MAX_SCHEMA_BYTES:
            raise SchemaRefused(f"the schema is {len(self.text)} bytes long; at most {MAX_SCHEMA_BYTES} are allowed")
        if _deeper_than(schema, MAX_NESTING):
            raise SchemaRefused(f"the schema nests more than {MAX_NESTING} levels deep")
        if _names_dialect(schema):
            raise SchemaRefused("a schema within the schema names a dialect of its own ($schema)")
        if _refers_elsewhere(schema):
            raise SchemaRefused("the schema refers to another document; only references within it (#...) are allowed")
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise SchemaRefused(f"not a JSON schema: {error.message[:300]}") from error
        self._schema = {name: value for name, value in schema.items() if name != "$schema"}

    def validate(self, value: Any) -> None:
        """Raises SchemaMismatch, also when telling would take too long."""
        validate(self._schema, value)


@dataclass(slots=True)
class Budget:
    """What comparing may still take."""

    left: int = MAX_COMPARISONS


def validate(schema: dict[str, Any], value: Any, budget: Budget | None = None) -> None:
    """As Schema.validate, under a schema that was checked, or a part of one. Calls may share a budget: it is below zero
    after one that took too long."""
    try:
        with _bounded(value, budget or Budget()):
            _Validator(schema).validate(value)
    except _TooMuchWork as error:
        raise SchemaMismatch("comparing the value with the schema takes too long") from error
    except ValidationError as error:
        raise SchemaMismatch(error.message[:500]) from error
    except Unresolvable as error:
        raise SchemaMismatch(f"the schema refers to what it does not hold: {error.ref}"[:500]) from error
    except (_TooDeep, RecursionError) as error:
        raise SchemaMismatch("the schema refers to itself without end, or the value nests too deeply") from error
    except ArithmeticError as error:
        raise SchemaMismatch(f"a number is too large to compare: {error}") from error


class _TooMuchWork(Exception):
    pass


class _TooDeep(Exception):
    pass


@dataclass(slots=True)
class _Work:
    """What comparing may still take, and the size of each list and object in the value, by its identity. `depth`:
    keywords that are being checked within each other."""

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
    """Nested alternatives make a short schema take exponential time; no episode may stall the others with one. A
    keyword counts for the list that it goes through, and for the size of a value that its message would show."""

    def counted(validator: Any, wanted: Any, instance: Any, schema: dict[str, Any]) -> Any:
        work = _work.get()
        listed = len(cast("list[Any]", wanted)) if isinstance(wanted, list) else 0
        work.budget.left -= 1 + listed + work.sizes.get(id(instance), 0) // 64
        if work.budget.left < 0:
            raise _TooMuchWork
        found = check(validator, wanted, instance, schema)
        return _within(work, cast("Generator[ValidationError]", found)) if isinstance(found, Generator) else found

    return counted


def _within(work: _Work, found: Generator[ValidationError]) -> Generator[ValidationError]:
    """Stops a schema that refers to itself before Python's recursion limit does: the library's compiled part (rpds)
    panics at it, with an exception that is no Exception."""
    work.depth += 1
    try:
        if work.depth > _MAX_DEPTH:
            raise _TooDeep
        yield from found
    finally:
        work.depth -= 1


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: dict[str, Any]) -> Generator[ValidationError]:
    """The keyword's own check compares each item with each other one."""
    if wanted and isinstance(instance, list):
        items = cast("list[Any]", instance)
        if len({_identity(item) for item in items}) < len(items):
            yield ValidationError(f"{str(items)[:100]} has non-unique elements")


def _identity(value: Any) -> Any:
    """Equal for values that JSON Schema takes as equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return "object", frozenset((key, _identity(item)) for key, item in cast("dict[str, Any]", value).items())
    if isinstance(value, list):
        return "array", tuple(_identity(item) for item in cast("list[Any]", value))
    return isinstance(value, bool), value


def _left_to_the_grammar(*_: Any) -> None:
    """Passes: the grammar holds completions to patterns, and Python's backtracking matcher must not see them."""


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: dict[str, Any]) -> Any:
    """The keyword's own check, but where patterns say which properties are additional."""
    if "patternProperties" in schema:
        return ()
    return _KNOWN["additionalProperties"](validator, allowed, instance, schema)


_KNOWN: dict[str, Callable[..., Any]] = cast("Any", Draft202012Validator).VALIDATORS
_KEYWORDS = {
    **_KNOWN,
    "pattern": _left_to_the_grammar,
    "patternProperties": _left_to_the_grammar,
    "additionalProperties": _additional_properties,
    "uniqueItems": _unique_items,
    "unevaluatedProperties": _left_to_the_grammar,  # it matches the patterns of all it evaluated
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
        return list(cast("dict[str, Any]", node).values())
    return cast("list[Any]", node) if isinstance(node, list) else []


def _objects(value: Any) -> Generator[dict[str, Any]]:
    """The value and all it holds, as far as they are objects."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield cast("dict[str, Any]", node)
        pending.extend(_children(node))


def _refers_elsewhere(schema: Any) -> bool:
    targets = (node.get(key) for node in _objects(schema) for key in ("$ref", "$dynamicRef"))
    return any(isinstance(target, str) and not target.startswith("#") for target in targets)


def _names_dialect(schema: dict[str, Any]) -> bool:
    """Under a dialect of its own, a schema within would be checked by the library's validator instead of ours."""
    return any(isinstance(node.get("$schema"), str) for node in _objects(schema) if node is not schema)
