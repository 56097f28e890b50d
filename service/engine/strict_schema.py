"""Owns the rewriting of a schema so that the engine's grammar holds a completion to all of it, or its refusal.

xgrammar, which compiles schemas for vLLM, passes over some keywords in silence: a completion could break them. Tools
are promised to be valid by construction, so what cannot be written without such a keyword is refused.
"""

import json
from typing import Any, cast
from urllib.parse import unquote

from service.validation.json_schema import (
    MAX_NESTING,
    MAX_SCHEMA_BYTES,
    Budget,
    Schema,
    SchemaMismatch,
    SchemaRefused,
    validate,
)

Node = dict[str, Any]

_MAX_NODES = MAX_SCHEMA_BYTES // 4
"""More than a schema that is not too large can have, the values that it lists among them."""
_MAX_CHECKED_BYTES = 2 * MAX_SCHEMA_BYTES
"""Of the places that are referred to, each once: checking one takes as long as checking a schema of its size."""

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "discriminator"}
)
_DROPPED = frozenset({"$defs", "definitions", "$schema", "$id"})
_PASSED_OVER = ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "contains")
_NEED_A_TYPE = frozenset(
    {"minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    | {"multipleOf", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties"}
)
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")
_SCHEMA = ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties"})
_SCHEMAS_IN_ORDER = frozenset({*_ALTERNATIVES, "prefixItems"})


def strict(schema: Node) -> Node | bool:
    """The schema with its references written out, so that it can stand inside another one, and with nothing in it that
    the grammar passes over. Raises SchemaRefused for a reference that is recursive or not a JSON pointer within the
    schema (RFC 6901), and for what cannot be held."""
    Schema(schema)
    return _Rewriting(schema).node(schema, ())


_TOO_LARGE = "the schema is too large with its references written out"


class _Rewriting:
    def __init__(self, root: Node) -> None:
        self._root = root
        self._num_nodes = 0
        self._depth = 0
        self._checked: set[int] = set()
        self._num_checked_bytes = 0
        self._budget = Budget()

    def node(self, schema: Any, seen: tuple[str, ...]) -> Any:
        self._count(1)
        if self._depth > MAX_NESTING:
            raise SchemaRefused(_TOO_LARGE)
        self._depth += 1
        try:
            return self._rewritten(schema, seen)
        finally:
            self._depth -= 1

    def _rewritten(self, schema: Any, seen: tuple[str, ...]) -> Any:
        if not isinstance(schema, dict):
            return schema  # true or false
        found = {name: value for name, value in cast("Node", schema).items() if name not in _DROPPED}
        if "$dynamicRef" in found:
            raise SchemaRefused("the schema refers to itself dynamically")
        if "$ref" in found:
            return self._referred(found, seen)
        self._count(len(found.get("enum", ())))
        return _held(found | self._parts(found, seen), self._budget)

    def _count(self, num_nodes: int) -> None:
        self._num_nodes += num_nodes
        if self._num_nodes > _MAX_NODES:
            raise SchemaRefused(_TOO_LARGE)

    def _parts(self, found: Node, seen: tuple[str, ...]) -> Node:
        parts: Node = {name: self.node(found[name], seen) for name in _SCHEMA if name in found}
        for name in found.keys() & _SCHEMAS_BY_NAME:
            parts[name] = {key: self.node(child, seen) for key, child in found[name].items()}
        for name in found.keys() & _SCHEMAS_IN_ORDER:
            parts[name] = [self.node(child, seen) for child in found[name]]
        return parts

    def _referred(self, found: Node, seen: tuple[str, ...]) -> Any:
        target = found.pop("$ref")
        if target in seen:
            raise SchemaRefused(f"the schema is recursive: {target}")
        if rest := found.keys() - _ANNOTATIONS:
            raise SchemaRefused(f"{min(rest)!r} beside $ref cannot be held; write the two as one schema")
        referred = self.node(self._resolve(target), (*seen, target))
        return {**cast("Node", referred), **found} if isinstance(referred, dict) else referred

    def _resolve(self, target: str) -> Any:
        node: Any = self._root
        pointer = target.removeprefix("#")
        if pointer and not pointer.startswith("/"):
            raise SchemaRefused(f"the schema refers to {target[:100]!r}, which is not a place within it (#/...)")
        for part in pointer.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                node = cast("list[Any]", node)[int(name)] if isinstance(node, list) else node[name]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise SchemaRefused(f"the schema refers to {target[:100]!r}, which it does not hold") from error
        if id(node) not in self._checked:  # it may stand where no schema does, and be none
            self._num_checked_bytes += len(json.dumps(node))
            if self._num_checked_bytes > _MAX_CHECKED_BYTES:
                raise SchemaRefused(_TOO_LARGE)
            Schema({"allOf": [node]})
            self._checked.add(id(node))
        return node


def _held(found: Node, budget: Budget) -> Node:
    """The node, whose parts are held, so that the grammar holds it. It looks at one of enum, const, anyOf, oneOf and
    allOf, and then at nothing beside them."""
    for name in _PASSED_OVER:
        if name in found:
            raise SchemaRefused(f"{name!r} cannot be held")
    if "enum" in found or "const" in found:
        return _chosen(found, budget)
    for name in _ALTERNATIVES:
        if name in found:
            return _alternatives(found, name)
    if "type" not in found and (untyped := found.keys() & _NEED_A_TYPE):
        raise SchemaRefused(f"{min(untyped)!r} cannot be held without a type beside it")
    if unknown := set(found.get("required", ())) - found.get("properties", {}).keys():
        raise SchemaRefused(f"{min(unknown)!r} is required and not among the properties")
    return found


def _chosen(found: Node, budget: Budget) -> Node:
    """Of the listed values those that are valid under all that stands beside them."""
    if beside := found.keys() & {"pattern", "format", "patternProperties"}:
        raise SchemaRefused(f"{min(beside)!r} beside enum or const cannot be held")
    values = found.get("enum", [found.get("const")])
    beside_values = {name: value for name, value in found.items() if name != "enum" or "const" in found}
    valid = [value for value in values if _is_valid(beside_values, value, budget)]
    if not valid:
        raise SchemaRefused("none of the values of an enum or const is valid")
    return {**_annotations(found), "enum": valid}


def _is_valid(schema: Node, value: Any, budget: Budget) -> bool:
    try:
        validate(schema, value, budget)
    except SchemaMismatch as error:
        if budget.left < 0:
            raise SchemaRefused("telling which values of its enums are valid takes too long") from error
        return False
    return True


def _alternatives(found: Node, name: str) -> Node:
    branches = found[name]
    rest = found.keys() - _ANNOTATIONS - {name}
    if rest == {"type"} and all(_type(branch) == found["type"] for branch in branches):
        rest = set[str]()
    if rest:
        raise SchemaRefused(f"{min(rest)!r} beside {name} cannot be held; write it into each of its schemas")
    if name == "allOf":
        if len(branches) > 1:
            raise SchemaRefused("allOf of several schemas cannot be held; write them as one")
        (branch,) = branches
        return {**branch, **_annotations(found)} if isinstance(branch, dict) else branch
    return {**_annotations(found), name: branches}


def _type(schema: Any) -> Any:
    return cast("Node", schema).get("type") if isinstance(schema, dict) else None


def _annotations(found: Node) -> Node:
    return {name: value for name, value in found.items() if name in _ANNOTATIONS}
