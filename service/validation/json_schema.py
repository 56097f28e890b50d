"""Validates the JSON schemas of callers, and values against them, with a limit on the computation."""

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
"""Maximum number of nested keywords. Each takes up to five stack frames, and Python allows a thousand."""


class SchemaRefused(ValueError):
    """The schema is invalid or not supported. The message says why."""


class SchemaMismatch(ValueError):
    """The value is not valid under the schema. The message says what does not match."""


class Schema:
    """A self-contained JSON schema (draft 2020-12). `text` is the schema as compact JSON.

    Raises SchemaRefused if the schema is too large, nests too deeply, refers to another document, or is not a schema.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.text = json.dumps(schema, separators=(",", ":"))
        if len(self.text) > MAX_SCHEMA_BYTES:
            raise SchemaRefused(f"the schema is {len(self.text)} bytes long; at most {MAX_SCHEMA_BYTES} are allowed")
        if _deeper_than(schema, MAX_NESTING):
            raise SchemaRefused(f"the schema nests more than {MAX_NESTING} levels deep")
        if _has_nested_dialect(schema):
            raise SchemaRefused("a subschema declares its own dialect; $schema is only allowed at the top level")
        if _has_external_reference(schema):
            raise SchemaRefused("the schema refers to another document; only references within it (#...) are allowed")
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise SchemaRefused(f"not a JSON schema: {error.message[:300]}") from error
        self._schema = {name: value for name, value in schema.items() if name != "$schema"}

    def validate(self, value: Any) -> None:
        """Raises SchemaMismatch if the value is invalid, or if the validation exceeds the limit on computation."""
        validate(self._schema, value)


@dataclass(slots=True)
class Budget:
    """The computation that validations may still use."""

    left: int = MAX_COMPARISONS
    """Number of comparisons. It is negative once a validation was stopped because it took too long."""


def validate(schema: dict[str, Any], value: Any, budget: Budget | None = None) -> None:
    """Validates a value under a schema, or a part of one, that `Schema` has accepted. Raises SchemaMismatch.

    Several calls may share a budget. By default each call has its own.
    """
    try:
        with _bounded(value, budget or Budget()):
            _Validator(schema).validate(value)
    except _TooMuchWork as error:
        raise SchemaMismatch("validation takes too long: use a smaller value or a simpler schema") from error
    except ValidationError as error:
        raise SchemaMismatch(error.message[:500]) from error
    except Unresolvable as error:
        raise SchemaMismatch(f"a reference in the schema has no target: {error.ref}"[:500]) from error
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


def _accept(*_: Any) -> None:
    """Accepts everything. The engine's grammar enforces patterns on completions; Python's backtracking matcher must not
    run them, because it can take exponential time."""


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: dict[str, Any]) -> Any:
    """Checks `additionalProperties`, unless patterns decide which properties are additional: they are not matched."""
    if "patternProperties" in schema:
        return ()
    return _KNOWN["additionalProperties"](validator, allowed, instance, schema)


_KNOWN: dict[str, Callable[..., Any]] = cast("Any", Draft202012Validator).VALIDATORS
_KEYWORDS = {
    **_KNOWN,
    "pattern": _accept,
    "patternProperties": _accept,
    "additionalProperties": _additional_properties,
    "uniqueItems": _unique_items,
    "unevaluatedProperties": _accept,  # the library's check would match `patternProperties`
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
    """Yields all objects in a JSON value, the value itself included."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield cast("dict[str, Any]", node)
        pending.extend(_children(node))


def _has_external_reference(schema: Any) -> bool:
    targets = (node.get(key) for node in _objects(schema) for key in ("$ref", "$dynamicRef"))
    return any(isinstance(target, str) and not target.startswith("#") for target in targets)


def _has_nested_dialect(schema: dict[str, Any]) -> bool:
    """Whether a subschema has `$schema`. The library would check it with its own validator, which has no limits."""
    return any(isinstance(node.get("$schema"), str) for node in _objects(schema) if node is not schema)
