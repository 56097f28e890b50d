"""A generic text description of an environment, derived from its action space and observation space."""

import json
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from gymnasium.core import Env
from gymnasium.vector.utils import concatenate, create_empty_array

from service.environments.base import JsonObject, discrete

Space = spaces.Space[Any]

MAX_DISCRETE_ACTIONS = 1024
MAX_ELEMENTS = 4096
"""The maximum number of elements of an action array."""

SIGNIFICANT_DIGITS = 6

_REMEDY = "write a description of the environment (--describe)"


class GenericText:
    """The generic description.

    Discrete actions are named by their numbers. An action of a Text space is the text itself. Other actions are JSON
    values that follow a schema made from the action space. An observation that is a string is shown as it is, any other
    one as compact JSON. Raises ValueError if a space is not supported.
    """

    def __init__(self, env: Env[Any, Any]) -> None:
        self._actions: Space = env.action_space
        self.action_space: JsonObject = _action_space(self._actions)
        self.instructions: str = (
            f"Act in the environment {env.spec.id if env.spec else type(env.unwrapped).__name__}. "
            f"Observations: {_summary(env.observation_space)}. Actions: {_summary(self._actions)}."
        )

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        value = to_json(observation)
        return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    def action(self, action: Any) -> Any:
        if isinstance(self._actions, spaces.Discrete) and self.action_space["type"] == "discrete":
            return self._actions.dtype.type(action)
        return from_json(self._actions, action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool | None:
        """None: spaces do not define a task, so whether it was completed is unknown."""
        return None


def _action_space(space: Space) -> JsonObject:
    if isinstance(space, spaces.Discrete) and 2 <= space.n <= MAX_DISCRETE_ACTIONS:
        first = int(space.start)
        return discrete(tuple(str(first + number) for number in range(int(space.n))))
    if isinstance(space, spaces.Text):
        return {"type": "regex", "pattern": _pattern(space)}
    return {"type": "json", "schema": schema(space)}


def schema(space: Space) -> JsonObject:
    """The JSON schema of a space's values. Raises ValueError if JSON cannot represent the space."""
    match space:
        case spaces.Discrete():
            return _integer(int(space.start), int(space.start + space.n) - 1)
        case spaces.MultiDiscrete():
            return _array(space.start, space.start + space.nvec - 1, whole=True)
        case spaces.MultiBinary():
            return _array(np.zeros(space.shape), np.ones(space.shape), whole=True)
        case spaces.Box():
            return _array(space.low, space.high, whole=not np.issubdtype(space.dtype, np.floating))
        case spaces.Text():
            return _string(space)
        case spaces.Tuple():
            return _items([schema(part) for part in _parts(space)])
        case spaces.Dict():
            parts = {str(name): schema(part) for name, part in space.spaces.items()}
            return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}
        case spaces.Sequence():
            return {"type": "array", "items": schema(_feature(space))}
        case spaces.OneOf():
            choices = enumerate(_parts(space))
            return {"anyOf": [_items([_integer(number, number), schema(part)]) for number, part in choices]}
        case _:
            raise ValueError(f"an action space of type {type(space).__name__} cannot be represented as text; {_REMEDY}")


def _integer(low: int, high: int) -> JsonObject:
    return {"type": "integer", "minimum": low, "maximum": high}


def _array(low: Any, high: Any, *, whole: bool) -> JsonObject:
    """The schema of an array, or of a number if the shape is (). `low` and `high` are its elementwise bounds."""
    if low.size > MAX_ELEMENTS:
        raise ValueError(
            f"the action has {low.size} elements; actions in text can have at most {MAX_ELEMENTS}; {_REMEDY}"
        )
    if low.ndim:
        return _items([_array(below, above, whole=whole) for below, above in zip(low, high, strict=True)])
    kind = int if whole else float
    number: JsonObject = {"type": "integer" if whole else "number"}
    if np.isfinite(low):
        number["minimum"] = kind(low)
    if np.isfinite(high):
        number["maximum"] = kind(high)
    return number


def _string(space: spaces.Text) -> JsonObject:
    if escaped := sorted(char for char in space.character_set if char in '"\\' or char < " "):
        raise ValueError(
            f"a Text space with the character {escaped[0]!r} cannot be part of another space, because JSON escapes it; "
            f"{_REMEDY}"
        )
    return {"type": "string", "pattern": f"^{_pattern(space)}$"}


def _items(parts: list[JsonObject]) -> JsonObject:
    if not parts:
        return {"type": "array", "maxItems": 0}
    same = all(part == parts[0] for part in parts)
    bounds = {"minItems": len(parts), "maxItems": len(parts)}
    if same:
        return {"type": "array", "items": parts[0], **bounds}
    return {"type": "array", "prefixItems": parts, **bounds}


def _pattern(space: spaces.Text) -> str:
    """The regular expression of a Text space: its characters, as ranges, and the bounds of its length."""
    if not space.character_set:
        raise ValueError("a Text space without characters cannot be represented as text")
    ranges: list[list[int]] = []
    for code in sorted(map(ord, space.character_set - {"^"})):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    # Some engines read a caret that begins a class as a negation, even if it is escaped. Therefore it comes last.
    parts = ["-".join(map(_escaped, sorted(set(ends)))) for ends in ranges] + ["^"] * ("^" in space.character_set)
    characters = f"[{''.join(parts)}]" if ranges else "\\^"
    return f"{characters}{{{space.min_length},{space.max_length}}}"


def _escaped(code: int) -> str:
    """A character of a character class. Those with a meaning in a class or in JSON are written as their code."""
    return chr(code) if chr(code).isalnum() or code > 0xFFFF else f"\\u{code:04x}"


def from_json(space: Space, value: Any) -> Any:
    """Converts a JSON value to a value of the space, with its dtype and shape. Raises ValueError if it has none."""
    try:
        action = _convert(space, value)
    except (TypeError, KeyError, IndexError, OverflowError, ValueError) as error:
        raise ValueError(f"{value!r} is not an action of {space}") from error
    if not space.contains(action):
        raise ValueError(f"{value!r} is not an action of {space}")
    return action


def _convert(space: Space, value: Any) -> Any:
    match space:
        case spaces.Discrete():
            return space.dtype.type(value)
        case spaces.Tuple():
            return tuple(_convert(part, item) for part, item in zip(_parts(space), value, strict=True))
        case spaces.Dict():
            return {name: _convert(part, value[str(name)]) for name, part in space.spaces.items()}
        case spaces.Sequence():
            return _convert_sequence(space, value)
        case spaces.OneOf():
            number: int = value[0]
            return np.int64(number), _convert(_parts(space)[number], value[1])
        case spaces.Text():
            return value
        case _:
            return np.asarray(value, dtype=space.dtype)


def _convert_sequence(space: Any, value: Any) -> Any:
    items = tuple(_convert(space.feature_space, item) for item in value)
    if not space.stack:
        return items
    return concatenate(space.feature_space, items, cast(Any, create_empty_array(space.feature_space, len(items))))


def to_json(value: Any) -> Any:
    """Converts an observation to a JSON value.

    Arrays become lists, floats have 6 significant digits, infinity and NaN become strings.
    """
    match value:
        case np.ndarray() | np.generic():
            return to_json(cast(Any, value).tolist())
        case bool() | int() | str() | None:
            return value
        case float():
            return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if np.isfinite(value) else str(value)
        case dict():
            return {str(name): to_json(part) for name, part in cast(dict[Any, Any], value).items()}
        case Iterable():
            return [to_json(part) for part in cast(Iterable[Any], value)]
        case _:
            raise ValueError(f"an observation of type {type(value).__name__} cannot be represented as text; {_REMEDY}")


def _parts(space: Any) -> tuple[Space, ...]:
    # The parameter is untyped, because Gymnasium does not declare the types of the parts.
    return space.spaces


def _feature(space: Any) -> Space:
    return space.feature_space


def _summary(space: Space) -> str:
    """A short description of a space, without the arrays of bounds that its repr contains."""
    match space:
        case spaces.Discrete():
            return f"an integer from {int(space.start)} to {int(space.start + space.n) - 1}"
        case spaces.Tuple():
            return "[" + ", ".join(_summary(part) for part in _parts(space)) + "]"
        case spaces.Dict():
            return "{" + ", ".join(f"{name}: {_summary(part)}" for name, part in space.spaces.items()) + "}"
        case spaces.Sequence():
            return f"a list of any length, each item {_summary(_feature(space))}"
        case spaces.OneOf():
            choices = (f"[{number}, {_summary(part)}]" for number, part in enumerate(_parts(space)))
            return "one of " + " or ".join(choices)
        case spaces.Text():
            return f"a text of {space.min_length} to {space.max_length} of the characters {space.characters}"
        case _:
            return f"{type(space).__name__} of shape {list(space.shape or ())}"
