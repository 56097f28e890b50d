"""Hypothesis strategies for action spaces from the parts that people have: zod, pydantic, OpenAPI, OpenAI, MCP.

Most are accepted. Some have a keyword that is refused.
"""

from typing import Any

from hypothesis import strategies as st

Json = dict[str, Any]

PATTERNS = (
    *(r"^[a-z]+$", r"^\d{4}-\d{2}-\d{2}$", r"\.py$", r"^https://", r"^[\w.-]+$", r"^#[0-9a-fA-F]{6}$", r"^\S.*\S$"),
    *(r"^[cC][^\s-]{8,}$", r"^[0-9A-HJKMNP-TV-Z]{26}$", r"^\+[1-9]\d{1,14}$", r"^[A-Za-z0-9_-]{21}$", r"^v?\d+\.\d+$"),
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?$",
    *(r"^\p{Lu}\p{L}*$", r"^(north|south|east|west)( [1-9])?$", r"^(?=.*[A-Z])(?=.*\d).{8,}$", r"^[^\x00-\x1f]{1,80}$"),
)
REFUSED_PATTERNS = (r"(?<=/)\w+", r"\bword\b", r"^(a|b)\1$", "(?i)yes|no", r"^\p{Script=Greek}+$")

_FORMATS = (
    "date-time",
    "date",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
    "int64",
    "color",
)
_LEAVES: tuple[Json, ...] = (
    {"type": "string"},
    {"type": "string", "minLength": 1, "maxLength": 2083, "format": "uri"},
    {"type": "string", "format": "password", "writeOnly": True},
    {"type": "boolean", "default": False, "title": "Verbose"},
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 2**53 - 1},
    {"type": "integer", "minimum": 1, "maximum": 100, "default": 10, "description": None},
    {"type": "number", "minimum": 0, "exclusiveMinimum": True},
    {"type": "number", "minimum": -90, "maximum": 90},
    {"type": "number", "multipleOf": 0.01, "minimum": 0},
    {"type": ["string", "null"], "default": None},
    {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "Limit"},
    {"oneOf": [{"const": "asc", "title": "Ascending"}, {"const": "desc"}]},
    {"enum": ["celsius", "fahrenheit"], "type": "string", "nullable": True},
    {"const": "v1"},
    {"enum": [1, 2.5, "x", None, True]},
    {"not": {"enum": ["main", "master"]}, "type": "string"},
    {"type": "object"},
    {},
)
_REFUSED_LEAVES: tuple[Json, ...] = (
    {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    {"type": "integer", "multipleOf": 7},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"type": "array", "contains": {"const": 1}},
    {"type": "any"},
)
_NAMES = st.sampled_from(
    (
        "query",
        "path",
        "limit",
        "user_id",
        "dry-run",
        "x-trace",
        "filters",
        "Straße",
        "$top",
        "a.b",
        "type",
        "properties",
    )
)


def _leaves() -> st.SearchStrategy[Json]:
    formats = st.builds(lambda name: {"type": "string", "format": name}, st.sampled_from(_FORMATS))
    patterns = st.builds(
        lambda pattern, more: {"type": "string", "pattern": pattern, **more},
        st.sampled_from(PATTERNS),
        st.sampled_from(({}, {"maxLength": 40}, {"description": "d"})),
    )
    common = st.sampled_from(_LEAVES)
    refused = st.sampled_from(_REFUSED_LEAVES)
    return st.sampled_from([*"aaaaaaaaaaaaaaaaaaaaaaa", "refused"]).flatmap(
        lambda draw: refused if draw == "refused" else st.one_of(common, formats, patterns)
    )


def _objects(schemas: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.builds(
        lambda properties, num_required, more: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:num_required],
            **more,
        },
        st.dictionaries(_NAMES, schemas, max_size=5),
        st.integers(0, 5),
        st.sampled_from(({}, {"additionalProperties": False}, {"title": "Model"}, {"additionalProperties": True})),
    )


def _nested(schemas: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.one_of(
        _objects(schemas),
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 20}, schemas),
        st.builds(
            lambda first: {"type": "array", "items": first, "additionalItems": False}, st.lists(schemas, max_size=3)
        ),
        st.builds(lambda some: {"anyOf": some}, st.lists(schemas, min_size=1, max_size=3)),
        st.builds(lambda values: {"type": "object", "additionalProperties": values}, schemas),
        st.just({"$ref": "#/$defs/Node"}),
    )


_SCHEMAS = st.recursive(_leaves(), _nested, max_leaves=6)
_NODE = {
    "type": "object",
    "properties": {"value": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
    "required": ["value"],
}


def object_schemas() -> st.SearchStrategy[Json]:
    """Schemas of objects, as models and as parameters of tools."""
    more = ({}, {"$schema": "http://json-schema.org/draft-07/schema#"}, {"description": "Input"})
    return st.builds(
        lambda schema, beside: {**beside, **schema, "$defs": {"Node": _NODE}}, _objects(_SCHEMAS), st.sampled_from(more)
    )


_FORMS = (
    lambda name, text, schema: {"name": name, "description": text, "parameters": schema},
    lambda name, text, schema: {
        "type": "function",
        "function": {"name": name, "description": text, "parameters": schema, "strict": False},
    },
    lambda name, text, schema: {"type": "function", "name": name, "description": text, "parameters": schema},
    lambda name, text, schema: {"name": name, "title": None, "description": text, "inputSchema": schema, "_meta": {}},
    lambda name, text, schema: {"name": name, "input_schema": schema, "cache_control": {"type": "ephemeral"}},
)


def _tool_lists() -> st.SearchStrategy[list[Json]]:
    name = st.sampled_from(("search", "get_weather", "github/create_issue", "mcp__fs__read", "Ask user"))
    tool = st.builds(
        lambda form, name, text, schema: form(name, text, schema),
        st.sampled_from(_FORMS),
        name,
        st.sampled_from((None, "", "Searches the web.")),
        st.one_of(st.none(), object_schemas()),
    )
    return st.lists(tool, min_size=1, max_size=3, unique_by=lambda tool: (tool.get("function") or tool)["name"])


def action_spaces() -> st.SearchStrategy[Json]:
    """Action spaces of the types json, regex and tools."""
    patterns = st.sampled_from((*PATTERNS, *PATTERNS, *REFUSED_PATTERNS))
    return st.one_of(
        st.builds(lambda schema: {"type": "json", "schema": schema}, object_schemas()),
        st.builds(lambda pattern: {"type": "regex", "pattern": pattern}, patterns),
        st.builds(lambda tools: {"type": "tools", "tools": tools}, _tool_lists()),
    )
