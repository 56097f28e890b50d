"""Action spaces: which actions are allowed, how the engine enforces it, and how actions are parsed and written.

Each action space is a class that implements all its behaviour. To add one, write a class here, add it to `SPACES`, and
add its request model to `service/api/http/schemas.py` (CONTRIBUTING.md has a recipe). The classes do no I/O.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Self, cast

from service.engine.base import ActionSpaceRefused, Constraint, Probs
from service.engine.json_grammar import compiled, compiled_calls, compiled_pattern
from service.trajectory import JsonValue, ParseFailure
from service.validation import patterns, strict_json
from service.validation.json_schema import MAX_SCHEMA_BYTES, Schema, SchemaMismatch, SchemaRefused

Asked = Mapping[str, Any]
"""The field `action_space` of the body of POST /episode."""

MAX_ACTIONS = 1024
_MAX_MATCHED_CHARS = 1 << 18
_MAX_CACHED = 64
"""Number of compiled schemas that are kept in memory."""


class Space(ABC):
    """Base class of the action spaces. The engine uses only `choices`, `constraint` and `parse`."""

    __slots__ = ()

    type: ClassVar[str]
    """The value of `type` in a request."""
    is_slow_to_build: ClassVar[bool] = False
    """Whether `of` may take so long that it must run in a thread."""

    @classmethod
    @abstractmethod
    def of(cls, asked: Asked) -> Self:
        """Builds the space from a request. Raises ActionSpaceRefused if the request is invalid."""

    @classmethod
    def instructions(cls, asked: Asked) -> str:
        """Returns the description of the space for the system message; empty if it needs none."""
        return ""

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The legal actions as distinct texts; None if an action is generated text."""
        return None

    @property
    def probs(self) -> Probs | None:
        """Of which choices the decision gives the probability; None leaves it to the engine."""
        return None

    @property
    def constraint(self) -> Constraint | None:
        """The constraint on an action that is generated text; None if any text is allowed."""
        return None

    def narrowed(self, legal_actions: tuple[str, ...] | None) -> "Space":
        """Returns the space of one act, reduced to its `legal_actions`; None means that all actions are legal.

        Raises ActionSpaceRefused if these actions are not a non-empty subset of the space, or if it is not discrete.
        """
        if legal_actions is not None:
            raise ActionSpaceRefused("legal_actions is only supported in a discrete action space", "legal_actions")
        return self

    @abstractmethod
    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        """Parses the text of a completion.

        `finish_reason` is "stop", or "length" if `max_tokens` cut off the completion. Returns the action, or None and
        the reason why the text is not an action.
        """

    @abstractmethod
    def write(self, action: JsonValue) -> str:
        """Returns the text of an action that the caller chose. Raises ActionSpaceRefused if it is not in this space."""


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


@dataclass(frozen=True)
class DiscreteSpace(Space):
    """An action is one of `actions`: 2 to 1,024 distinct strings. One act may narrow them to one or more.

    asked_probs: the value of `probs` in the request.
    """

    type = "discrete"

    actions: tuple[str, ...]
    asked_probs: Probs | None = None

    @classmethod
    def of(cls, asked: Asked) -> "DiscreteSpace":
        return _discrete(tuple(asked["actions"]), asked.get("probs"))

    @property
    def choices(self) -> tuple[str, ...]:
        return self.actions

    def narrowed(self, legal_actions: tuple[str, ...] | None) -> "DiscreteSpace":
        if legal_actions is None:
            return self
        if not legal_actions or len(set(legal_actions)) < len(legal_actions):
            raise ActionSpaceRefused("legal_actions must be a non-empty list of distinct actions", "legal_actions")
        if unknown := set(legal_actions) - self._known:
            raise ActionSpaceRefused(
                f"the legal action {min(unknown)[:100]!r} is not in the action space", "legal_actions"
            )
        return DiscreteSpace(legal_actions, self.asked_probs)

    @property
    def probs(self) -> Probs | None:
        return self.asked_probs

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.actions)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        return text, None

    def write(self, action: JsonValue) -> str:
        if action not in self.actions:
            raise ActionSpaceRefused(f"the action {str(action)[:100]!r} is not among the legal actions")
        return action


@lru_cache(maxsize=1024)
def _discrete(actions: tuple[str, ...], probs: Probs | None) -> DiscreteSpace:
    """Builds a discrete space. Equal requests share one object."""
    if not 2 <= len(actions) <= MAX_ACTIONS:
        raise ActionSpaceRefused(f"the action space has {len(actions)} actions; 2 to {MAX_ACTIONS} are allowed")
    if len(set(actions)) < len(actions):
        raise ActionSpaceRefused("actions must be distinct")
    if not all(actions):
        raise ActionSpaceRefused("an action must not be an empty string")
    return DiscreteSpace(actions, probs)


@dataclass(frozen=True, slots=True)
class RegexSpace(Space):
    """An action is text that the pattern matches in full. The engine enforces this."""

    type = "regex"
    is_slow_to_build = True

    pattern: str
    grammar: str

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """Builds the space. Raises ActionSpaceRefused if the pattern is invalid or not supported."""
        try:
            return cls(asked["pattern"], compiled_pattern(asked["pattern"]))
        except ValueError as error:
            raise ActionSpaceRefused(f"the pattern is refused: {error}") from error

    @property
    def constraint(self) -> Constraint:
        return Constraint("guidance", self.grammar)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        if finish_reason != "stop":
            return None, ParseFailure("length", "max_tokens cut off the completion before the pattern matched in full.")
        return text, None

    def write(self, action: JsonValue) -> str:
        text = _text(action)
        if len(text) > _MAX_MATCHED_CHARS:
            raise ActionSpaceRefused(f"the action has more than {_MAX_MATCHED_CHARS} characters")
        try:
            matches = patterns.matches(self.pattern, text, searches=False)
        except patterns.PatternRefused as error:
            raise ActionSpaceRefused(str(error)) from error
        if not matches:
            raise ActionSpaceRefused("the action must match the whole pattern of the action space")
        return text


@dataclass(frozen=True, slots=True)
class JsonSpace(Space):
    """An action is a JSON value that is valid under the schema.

    The engine restricts the tokens by a grammar. `parse` validates the value against the whole schema, because a schema
    that is not strict may have keywords that no grammar enforces.
    """

    type = "json"
    is_slow_to_build = True

    schema: Schema
    grammar: str

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """Builds the space. Raises ActionSpaceRefused if the schema is invalid, not supported, or too large; unless
        `strict` is false, also if it has a keyword that the grammar cannot enforce."""
        return cls(*_compiled(json.dumps(asked["schema"]), strict=asked.get("strict") is not False))

    @property
    def constraint(self) -> Constraint:
        return Constraint("guidance", self.grammar)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        return _parsed(text, finish_reason, self.schema.validate)

    def write(self, action: JsonValue) -> str:
        return _written(action, self.schema.validate)


@lru_cache(maxsize=_MAX_CACHED)
def _compiled(schema: str, *, strict: bool) -> tuple[Schema, str]:
    """Compiles a schema, given as JSON. Episodes with equal schemas share the result. Raises ActionSpaceRefused."""
    try:
        checked = Schema(json.loads(schema))
        return checked, compiled(checked, strict=strict)
    except SchemaRefused as error:
        raise ActionSpaceRefused(str(error)) from error


@dataclass(frozen=True, slots=True)
class ToolsSpace(Space):
    """An action is a tool call, {"name", "arguments"}, that is valid under the tool's schema."""

    type = "tools"
    is_slow_to_build = True

    schemas: Mapping[str, Schema]
    """The schemas of the arguments, by the names of the tools."""
    grammar: str

    @classmethod
    def of(cls, asked: Asked) -> Self:
        """Builds the space.

        Raises ActionSpaceRefused if two tools have the same name, or if a schema is refused; see `JsonSpace`. A schema
        of parameters must be of type object.
        """
        tools: list[dict[str, Any]] = asked["tools"]
        names = [tool["name"] for tool in tools]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ActionSpaceRefused(f"two tools have the same name, {duplicates[0]!r}")
        if len(json.dumps([tool.get("parameters") for tool in tools])) > MAX_SCHEMA_BYTES:
            raise ActionSpaceRefused(f"the tools' schemas are too large: more than {MAX_SCHEMA_BYTES} bytes in total")
        parameters = {tool["name"]: tool.get("parameters") for tool in tools}
        return cls(*_compiled_calls(json.dumps(parameters), strict=asked.get("strict") is not False))

    @classmethod
    def instructions(cls, asked: Asked) -> str:
        lines = [json.dumps(tool, ensure_ascii=False) for tool in asked["tools"]]
        answer = '{"name": the tool\'s name, "arguments": its arguments}'
        return "\n".join(["Tools:", *lines, f"Call one tool at a time. Answer with one JSON object: {answer}"])

    @property
    def constraint(self) -> Constraint:
        return Constraint("guidance", self.grammar)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        return _parsed(text, finish_reason, self._validate)

    def write(self, action: JsonValue) -> str:
        return _written(action, self._validate)

    def _validate(self, call: Any) -> None:
        """Raises SchemaMismatch if the value is not a valid call."""
        given = cast("dict[str, Any]", call) if isinstance(call, dict) else {}
        if given.keys() != {"name", "arguments"}:
            raise SchemaMismatch('the action must be a tool call: an object with "name" and "arguments"')
        name = given["name"]
        if not isinstance(name, str) or name not in self.schemas:
            raise SchemaMismatch(f"there is no tool {str(name)[:100]!r}; the tools are {', '.join(self.schemas)}"[:500])
        try:
            self.schemas[name].validate(given["arguments"])
        except SchemaMismatch as error:
            raise SchemaMismatch(f"the arguments of {name!r} are invalid: {error}"[:500]) from error


@lru_cache(maxsize=_MAX_CACHED)
def _compiled_calls(parameters: str, *, strict: bool) -> tuple[Mapping[str, Schema], str]:
    """Compiles the schemas of the parameters of tools, given as JSON by the names of the tools. Raises
    ActionSpaceRefused."""
    try:
        schemas = {name: _parameters(name, given) for name, given in json.loads(parameters).items()}
        return schemas, compiled_calls([(name, schema, strict) for name, schema in schemas.items()])
    except SchemaRefused as error:
        raise ActionSpaceRefused(str(error)) from error


_NO_PARAMETERS = {"type": "object", "additionalProperties": False}


def _parameters(name: str, given: dict[str, Any] | None) -> Schema:
    """Returns the schema of a tool's arguments. Raises SchemaRefused."""
    owner = f"tool {name!r}"
    parameters = _NO_PARAMETERS if given is None else given
    types = parameters.get("type", "object")
    if types != "object" and not (isinstance(types, list) and "object" in types):
        given_type = json.dumps(types, ensure_ascii=False)[:40]
        raise SchemaRefused(f"{owner}: the 'type' of the parameters must be \"object\", not {given_type}")
    return Schema({**parameters, "type": "object"}, owner=owner, noun="parameter")


def _parsed(text: str, finish_reason: str, validate: Callable[[Any], None]) -> tuple[JsonValue, ParseFailure | None]:
    """Parses the text of a completion that must be a valid JSON value. Returns the value, or why the text is none."""
    if finish_reason != "stop":
        return None, ParseFailure("length", "max_tokens cut off the completion before the JSON value was complete.")
    try:
        value = strict_json.parse(text)
        strict_json.dump(value)  # a value that cannot be stored is not an action
        validate(value)
    except SchemaMismatch as error:
        return None, ParseFailure("schema", str(error))
    except ValueError as error:
        return None, ParseFailure("json", str(error)[:500])
    return value, None


def _written(action: JsonValue, validate: Callable[[Any], None]) -> str:
    try:
        validate(action)
    except SchemaMismatch as error:
        raise ActionSpaceRefused(str(error)) from error
    return json.dumps(action, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class RefusedSpace(Space):
    """Replaces the action space of a stored episode that is no longer accepted. The episode can only be ended."""

    reason: str

    @classmethod
    def of(cls, asked: Asked) -> Self:
        raise NotImplementedError("a request cannot ask for this space")

    def narrowed(self, legal_actions: tuple[str, ...] | None) -> Space:
        raise ActionSpaceRefused(self.reason)

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        raise ActionSpaceRefused(self.reason)

    def write(self, action: JsonValue) -> str:
        raise ActionSpaceRefused(self.reason)


SPACES: Mapping[str, type[Space]] = {
    space.type: space for space in (TextSpace, DiscreteSpace, JsonSpace, RegexSpace, ToolsSpace)
}
"""The action spaces that a request can ask for, by `type`."""

_DEFAULT: Asked = {"type": TextSpace.type}


def asked_space(request: Asked) -> tuple[type[Space], Asked]:
    """Returns the class of the action space that an episode's request asks for, and the fields to build it from.

    The default is any text. Raises ActionSpaceRefused if the type does not exist.
    """
    asked: Asked = request.get("action_space") or _DEFAULT
    space = SPACES.get(asked["type"])
    if space is None:
        raise ActionSpaceRefused(f"unknown action space type {asked['type']!r}; the types are {', '.join(SPACES)}")
    return space, asked


def _text(action: JsonValue) -> str:
    if not isinstance(action, str):
        raise ActionSpaceRefused("the action must be a string in this action space")
    return action
