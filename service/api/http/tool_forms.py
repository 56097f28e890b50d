"""Translates the forms in which other programs describe tools to `name`, `description` and `parameters`."""

from typing import Any, cast

Form = dict[str, Any]

_SCHEMAS = ("parameters", "inputSchema", "input_schema")
_DROPPED = {
    "parameters": {"strict", "return"},  # OpenAI and Hugging Face, where the type is given
    # The Model Context Protocol; its Python SDK writes "meta".
    "inputSchema": {"title", "annotations", "outputSchema", "icons", "execution", "_meta", "meta"},
    "input_schema": {  # Anthropic
        *("strict", "cache_control", "defer_loading", "allowed_callers", "input_examples", "eager_input_streaming")
    },
}
"""Fields of the other forms that do not describe a call, by the field of the schema."""
_WANTED = 'write a tool as {"name", "description", "parameters"}'


def translated(given: Form) -> Form:
    """Returns a tool in the form that the service stores. Raises ValueError if it is not clear what is meant."""
    tool = dict(given)
    if "function_declarations" in tool or "functionDeclarations" in tool:
        raise ValueError(f"a list of function declarations is not a tool; {_WANTED}, one for each")
    kind = tool.pop("type", None)
    if kind not in (None, "function", "custom"):
        raise ValueError(f"tools of type {str(kind)[:40]!r} are not supported; {_WANTED}")
    if "function" in tool:
        function = tool.pop("function")
        if not isinstance(function, dict) or tool:
            raise ValueError(f"'function' must be an object, with no other field than 'type' beside it; or {_WANTED}")
        tool, kind = dict(cast("Form", function)), "function"
    tool = _with_one_schema(tool, is_typed=kind is not None)
    if unknown := sorted(tool.keys() - {"name", "description", "parameters"}):
        raise ValueError(f"the field {unknown[0][:40]!r} is not known; {_WANTED}")
    if "name" not in tool:
        raise ValueError(f"the name is missing; {_WANTED}")
    return tool


def _with_one_schema(tool: Form, *, is_typed: bool) -> Form:
    given = [name for name in _SCHEMAS if name in tool]
    schemas = {name: tool.pop(name) for name in given}
    named = [name for name in given if schemas[name] is not None]
    if len(named) > 1:
        raise ValueError(f"{named[0]!r} and {named[1]!r} are both given; {_WANTED}")
    form = (named or given or ["parameters"])[0]
    if form != "parameters" or is_typed:
        tool = {name: value for name, value in tool.items() if name not in _DROPPED[form]}
    if tool.get("description", "") is None:
        del tool["description"]
    return {**tool, "parameters": schemas[named[0]]} if named else tool
