"""Rewrites the JSON schema of a tool so that the engine's grammar enforces all of it, or refuses the schema.

xgrammar, which compiles schemas for vLLM, silently ignores some keywords, so a completion could violate them. The
service guarantees that tool calls are valid. Therefore it refuses schemas that need such a keyword.
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
"""Maximum number of subschemas and enum values. Only a schema with repeated references can have more."""
_MAX_CHECKED_BYTES = 2 * MAX_SCHEMA_BYTES
"""Maximum total size of the distinct targets of references. Each is checked once, and the time grows with its size."""

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "discriminator"}
)
_DROPPED = frozenset({"$defs", "definitions", "$schema", "$id"})
_IGNORED_BY_GRAMMAR = ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "contains")
_ENFORCED_WITH_TYPE_ONLY = frozenset(
    {"minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    | {"multipleOf", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties"}
)
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")
_SCHEMA = ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties"})
_SCHEMAS_IN_ORDER = frozenset({*_ALTERNATIVES, "prefixItems"})


def strict(schema: Node) -> Node | bool:
    """Returns an equivalent schema without references and without keywords that the grammar ignores.

    Because references are expanded, the result can be embedded in another schema. Raises SchemaRefused for a reference
    that is recursive or is not a JSON pointer within the schema (RFC 6901), and for keywords that are not supported.
    """
    Schema(schema)
    return _Rewriter(schema).node(schema, ())


_TOO_LARGE = "the schema is too large once its references are expanded"


class _Rewriter:
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
            return self._rewrite(schema, seen)
        finally:
            self._depth -= 1

    def _rewrite(self, schema: Any, seen: tuple[str, ...]) -> Any:
        if not isinstance(schema, dict):
            return schema  # true or false
        found = {name: value for name, value in cast("Node", schema).items() if name not in _DROPPED}
        if "$dynamicRef" in found:
            raise SchemaRefused("the keyword '$dynamicRef' is not supported in tool schemas")
        if "$ref" in found:
            return self._dereference(found, seen)
        self._count(len(found.get("enum", ())))
        return _enforceable(found | self._parts(found, seen), self._budget)

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

    def _dereference(self, found: Node, seen: tuple[str, ...]) -> Any:
        target = found.pop("$ref")
        if target in seen:
            raise SchemaRefused(f"the reference {target!r} is recursive, which is not supported in tool schemas")
        if rest := found.keys() - _ANNOTATIONS:
            raise SchemaRefused(
                f"the keyword {min(rest)!r} beside $ref is not supported; merge the two into one schema"
            )
        referred = self.node(self._resolve(target), (*seen, target))
        return {**cast("Node", referred), **found} if isinstance(referred, dict) else referred

    def _resolve(self, target: str) -> Any:
        node: Any = self._root
        pointer = target.removeprefix("#")
        if pointer and not pointer.startswith("/"):
            raise SchemaRefused(f"the reference {target[:100]!r} is not a JSON pointer within the schema (#/...)")
        for part in pointer.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                node = cast("list[Any]", node)[int(name)] if isinstance(node, list) else node[name]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise SchemaRefused(f"the reference {target[:100]!r} has no target in the schema") from error
        if id(node) not in self._checked:  # a pointer may refer to a value that is not a schema
            self._num_checked_bytes += len(json.dumps(node))
            if self._num_checked_bytes > _MAX_CHECKED_BYTES:
                raise SchemaRefused(_TOO_LARGE)
            Schema({"allOf": [node]})
            self._checked.add(id(node))
        return node


def _enforceable(found: Node, budget: Budget) -> Node:
    """Returns a node that the grammar enforces, if it enforces the parts of `found`. Raises SchemaRefused.

    If a node has enum, const, anyOf, oneOf or allOf, the grammar uses one of these and ignores all keywords beside it.
    """
    for name in _IGNORED_BY_GRAMMAR:
        if name in found:
            raise SchemaRefused(f"the keyword {name!r} is not supported in tool schemas")
    if "enum" in found or "const" in found:
        return _narrow_enum(found, budget)
    for name in _ALTERNATIVES:
        if name in found:
            return _alternatives(found, name)
    if "type" not in found and (untyped := found.keys() & _ENFORCED_WITH_TYPE_ONLY):
        raise SchemaRefused(f"the keyword {min(untyped)!r} is not supported without a type beside it")
    if unknown := set(found.get("required", ())) - found.get("properties", {}).keys():
        raise SchemaRefused(f"{min(unknown)!r} is in 'required' but not in 'properties'; add it there")
    return found


def _narrow_enum(found: Node, budget: Budget) -> Node:
    """Returns an enum of only the values that are valid under the keywords beside it."""
    if beside := found.keys() & {"pattern", "format", "patternProperties"}:
        raise SchemaRefused(f"the keyword {min(beside)!r} beside enum or const is not supported; remove it")
    values = found.get("enum", [found.get("const")])
    beside_values = {name: value for name, value in found.items() if name != "enum" or "const" in found}
    valid = [value for value in values if _is_valid(beside_values, value, budget)]
    if not valid:
        raise SchemaRefused("none of the values of an enum or const is valid under the keywords beside it")
    return {**_annotations(found), "enum": valid}


def _is_valid(schema: Node, value: Any, budget: Budget) -> bool:
    try:
        validate(schema, value, budget)
    except SchemaMismatch as error:
        if budget.left < 0:
            raise SchemaRefused(
                "checking the values of its enums takes too long; simplify the keywords beside them"
            ) from error
        return False
    return True


def _alternatives(found: Node, name: str) -> Node:
    branches = found[name]
    rest = found.keys() - _ANNOTATIONS - {name}
    if rest == {"type"} and all(_type(branch) == found["type"] for branch in branches):
        rest = set[str]()
    if rest:
        raise SchemaRefused(
            f"the keyword {min(rest)!r} beside {name} is not supported; move it into each schema of {name}"
        )
    if name == "allOf":
        if len(branches) > 1:
            raise SchemaRefused("allOf with several schemas is not supported; merge them into one schema")
        (branch,) = branches
        return {**branch, **_annotations(found)} if isinstance(branch, dict) else branch
    return {**_annotations(found), name: branches}


def _type(schema: Any) -> Any:
    return cast("Node", schema).get("type") if isinstance(schema, dict) else None


def _annotations(found: Node) -> Node:
    return {name: value for name, value in found.items() if name in _ANNOTATIONS}
