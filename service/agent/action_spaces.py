"""Action spaces: what an action may be, the constraint that makes a completion one, how it is parsed and written.

A space carries all its behaviour. To add one, write a class here, add it to `SPACES`, and give it a request model in
`service/api/http/schemas.py` (CONTRIBUTING.md has the recipe). Pure.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

from service.engine.base import ActionSpaceRefused, Constraint
from service.engine.strict_schema import strict
from service.trajectory import JsonValue, ParseFailure
from service.validation import strict_json
from service.validation.json_schema import MAX_SCHEMA_BYTES, Schema, SchemaMismatch, SchemaRefused

Asked = Mapping[str, Any]
"""An `action_space` as POST /episode was given it."""

MAX_ACTIONS = 1024
MAX_PATTERN_CHARS = 4096


class Space(ABC):
    """An action space. Offers the engine `choices` or a `constraint`, and nothing of its own beyond that."""

    __slots__ = ()

    type: ClassVar[str]
    """The value of `type` in a request."""
    is_slow_to_build: ClassVar[bool] = False
    """Whether `of` may take so long that it belongs in a thread."""

    @classmethod
    @abstractmethod
    def of(cls, asked: Asked) -> Self:
        """The space that a request asks for. Raises ActionSpaceRefused."""

    @classmethod
    def instructions(cls, asked: Asked) -> str:
        """What the system message says about the space; empty if nothing."""
        return ""

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The legal actions as distinct texts; None if an action is written freely."""
        return None

    @property
    def constraint(self) -> Constraint | None:
        """What a written action must be; None for any text."""
        return None

    @property
    def unverified(self) -> Constraint | None:
        """The constraint that the engine must check the text of a recorded action against, because `write` cannot."""
        return None

    def narrowed(self, legal_actions: tuple[str, ...] | None) -> "Space":
        """The space of one act. Raises ActionSpaceRefused for legal actions that this space cannot be narrowed to."""
        if legal_actions is not None:
            raise ActionSpaceRefused("legal_actions narrows a discrete action space only", "legal_actions")
        return self

    @abstractmethod
    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        """The action that a completion's text stands for, or why it is none."""

    @abstractmethod
    def write(self, action: JsonValue) -> str:
        """The text of an action that somebody else chose. Raises ActionSpaceRefused for one outside this space."""


@dataclass(frozen=True, slots=True)
class TextSpace(Space):
    """Any text is an action."""

    type = "text"

    @classmethod
    def of(cls, asked: Asked) -> Self:
        return cls()

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        return text, None

    def write(self, action: JsonValue) -> str:
        return _text(action)


@dataclass(frozen=True, slots=True)
class DiscreteSpace(Space):
    """An action is one of `actions`, 2 to 1,024 distinct strings; in one act, any non-empty selection of them."""

    type = "discrete"

    actions: tuple[str, ...]

    @classmethod
    def of(cls, asked: Asked) -> "DiscreteSpace":
        return _discrete(tuple(asked["actions"]))

    @property
    def choices(self) -> tuple[str, ...]:
        return self.actions

    def narrowed(self, legal_actions: tuple[str, ...] | None) -> "DiscreteSpace":
        if legal_actions is None:
            return self
        if not legal_actions or len(set(legal_actions)) < len(legal_actions):
            raise ActionSpaceRefused("legal_actions must be distinct and not empty", "legal_actions")
        if unknown := set(legal_actions) - set(self.actions):
            raise ActionSpaceRefused(f"{min(unknown)!r} is not in the action space", "legal_actions")
        return DiscreteSpace(legal_actions)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        return text, None

    def write(self, action: JsonValue) -> str:
        if action not in self.actions:
            raise ActionSpaceRefused(f"{str(action)[:100]!r} is not among the legal actions")
        return action


@lru_cache(maxsize=1024)
def _discrete(actions: tuple[str, ...]) -> DiscreteSpace:
    """Equal spaces are shared."""
    if not 2 <= len(actions) <= MAX_ACTIONS:
        raise ActionSpaceRefused(f"{len(actions)} actions; 2 to {MAX_ACTIONS} are allowed")
    if len(set(actions)) < len(actions):
        raise ActionSpaceRefused("actions must be distinct")
    if not all(actions):
        raise ActionSpaceRefused("an action must not be empty")
    return DiscreteSpace(actions)


@dataclass(frozen=True, slots=True)
class RegexSpace(Space):
    """An action is a text that the pattern matches in full. The engine enforces it."""

    type = "regex"

    pattern: str

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """Whether the pattern compiles is the engine's to say."""
        pattern: str = asked["pattern"]
        if len(pattern) > MAX_PATTERN_CHARS:
            raise ActionSpaceRefused(f"the pattern is {len(pattern)} characters long; at most {MAX_PATTERN_CHARS} are")
        return cls(pattern)

    @property
    def constraint(self) -> Constraint:
        return Constraint("regex", self.pattern)

    @property
    def unverified(self) -> Constraint:
        return self.constraint

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        if finish_reason != "stop":
            return None, ParseFailure("length", "The completion was cut before the pattern matched in full.")
        return text, None

    def write(self, action: JsonValue) -> str:
        return _text(action)


@dataclass(frozen=True, slots=True)
class JsonSpace(Space):
    """An action is a JSON value that is valid under the schema. The engine enforces its grammar."""

    type = "json"
    is_slow_to_build = True

    schema: Schema

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """Refuses a schema that is too large or too deep, that refers outside itself, or that is no schema."""
        return cls(_checked(asked["schema"]))

    @property
    def constraint(self) -> Constraint:
        return Constraint("json", self.schema.text)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        if finish_reason != "stop":
            return None, ParseFailure("length", "The completion was cut before the JSON value was complete.")
        try:
            value = strict_json.parse(text)
            strict_json.dump(value)  # a value that could not be stored is not an action
            self.schema.validate(value)
        except SchemaMismatch as error:
            return None, ParseFailure("schema", str(error))
        except ValueError as error:
            return None, ParseFailure("json", str(error)[:500])
        return value, None

    def write(self, action: JsonValue) -> str:
        """Does not check patterns within the schema."""
        try:
            self.schema.validate(action)
        except SchemaMismatch as error:
            raise ActionSpaceRefused(str(error)) from error
        return json.dumps(action, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class ToolsSpace(JsonSpace):
    """An action is a call of a tool, {"name", "arguments"}, valid under that tool's schema."""

    type = "tools"

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """Refuses names that clash, and parameters that are not an object's or that the grammar cannot enforce."""
        tools: list[dict[str, Any]] = asked["tools"]
        names = [tool["name"] for tool in tools]
        if twins := sorted({name for name in names if names.count(name) > 1}):
            raise ActionSpaceRefused(f"two tools are named {twins[0]!r}")
        if len(json.dumps([tool.get("parameters") for tool in tools])) > MAX_SCHEMA_BYTES:
            raise ActionSpaceRefused(f"the tools' schemas are too large: more than {MAX_SCHEMA_BYTES} bytes")
        calls: list[dict[str, Any]] = []
        room = MAX_SCHEMA_BYTES
        for tool in tools:
            call = _call_schema(tool)
            room -= len(json.dumps(call))
            if room < 0:
                raise ActionSpaceRefused("the tools' schemas are too large with their references written out")
            calls.append(call)
        return cls(_checked({"anyOf": calls}))

    @classmethod
    def instructions(cls, asked: Asked) -> str:
        lines = [json.dumps(tool, ensure_ascii=False) for tool in asked["tools"]]
        answer = '{"name": the tool\'s name, "arguments": its arguments}'
        return "\n".join(["Tools:", *lines, f"Call one tool at a time. Answer with one JSON object: {answer}"])


def _call_schema(tool: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = strict(tool.get("parameters") or {"type": "object", "properties": {}})
    except SchemaRefused as error:
        raise ActionSpaceRefused(f"tool {tool['name']!r}: {error}") from error
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise ActionSpaceRefused(f"tool {tool['name']!r}: the parameters must be of type object")
    return {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


@dataclass(frozen=True, slots=True)
class RefusedSpace(Space):
    """The space of an episode that was opened when it was accepted and is no longer. The episode can only end."""

    reason: str

    @classmethod
    def of(cls, asked: Asked) -> Self:
        raise NotImplementedError("no request asks for it")

    def narrowed(self, legal_actions: tuple[str, ...] | None) -> Space:
        raise ActionSpaceRefused(self.reason)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        raise ActionSpaceRefused(self.reason)

    def write(self, action: JsonValue) -> str:
        raise ActionSpaceRefused(self.reason)


SPACES: Mapping[str, type[Space]] = {
    space.type: space for space in (TextSpace, DiscreteSpace, JsonSpace, RegexSpace, ToolsSpace)
}
"""Every action space that can be asked for, by its `type`."""

_DEFAULT: Asked = {"type": TextSpace.type}


def asked_space(request: Asked) -> tuple[type[Space], Asked]:
    """The class of the space that an episode's request asks for, and what to build it from; any text if it asks for
    none. Raises ActionSpaceRefused for a type that does not exist."""
    asked: Asked = request.get("action_space") or _DEFAULT
    space = SPACES.get(asked["type"])
    if space is None:
        raise ActionSpaceRefused(f"there is no action space of type {asked['type']!r}")
    return space, asked


def _checked(schema: dict[str, Any]) -> Schema:
    try:
        return Schema(schema)
    except SchemaRefused as error:
        raise ActionSpaceRefused(str(error)) from error


def _text(action: JsonValue) -> str:
    if not isinstance(action, str):
        raise ActionSpaceRefused("an action of this space is a string")
    return action
