"""Owns JSON schemas as callers give them: which are accepted, and whether a value is valid, in bounded work."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import jsonschema.validators
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing.exceptions import Unresolvable

MAX_SCHEMA_BYTES = 64 * 1024
MAX_NESTING = 32
MAX_COMPARISONS = 100_000


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
        self._validator = _Validator({name: value for name, value in schema.items() if name != "$schema"})

    def validate(self, value: Any) -> None:
        """Raises SchemaMismatch, also when telling would take too long."""
        try:
            with _bounded():
                self._validator.validate(value)
        except _TooMuchWork as error:
            raise SchemaMismatch("comparing the value with the schema takes too long") from error
        except ValidationError as error:
            raise SchemaMismatch(error.message[:500]) from error
        except Unresolvable as error:
            raise SchemaMismatch(f"the schema refers to what it does not hold: {error.ref}"[:500]) from error


class _TooMuchWork(Exception):
    pass


_comparisons_left: ContextVar[int] = ContextVar("comparisons_left")


@contextmanager
def _bounded() -> Generator[None]:
    token = _comparisons_left.set(MAX_COMPARISONS)
    try:
        yield
    finally:
        _comparisons_left.reset(token)


def _counted(check: Callable[..., Any]) -> Callable[..., Any]:
    """Nested alternatives make a short schema take exponential time; no episode may stall the others with one."""

    def counted(*args: Any) -> Any:
        left = _comparisons_left.get()
        if not left:
            raise _TooMuchWork
        _comparisons_left.set(left - 1)
        return check(*args)

    return counted


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
