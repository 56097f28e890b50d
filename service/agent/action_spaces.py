"""Owns action spaces: what an action may be, the constraint that makes a completion one, and how to parse it. Pure."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from service.engine.base import Constraint
from service.engine.strict_schema import strict
from service.trajectory import JsonValue, ParseFailure, Sampling
from service.validation import strict_json
from service.validation.json_schema import MAX_SCHEMA_BYTES, Schema, SchemaMismatch, SchemaRefused

MAX_ACTIONS = 1024
MAX_PATTERN_CHARS = 4096


class ActionSpaceError(ValueError):
    """The action space cannot be served; the message says why."""


@dataclass(frozen=True, slots=True)
class TextSpace:
    """Any text is an action."""

    constraint: Constraint | None = None

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        return text, None

    def write(self, action: JsonValue) -> str:
        """The text of somebody else's action. Raises ActionSpaceError for one that is not of this space."""
        return _text(action)


@dataclass(frozen=True, slots=True)
class RegexSpace:
    """An action is a text that the pattern matches in full; the engine holds completions to it."""

    constraint: Constraint

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        if finish_reason != "stop":
            return None, ParseFailure("length", "The completion was cut before the pattern matched in full.")
        return text, None

    def write(self, action: JsonValue) -> str:
        """As TextSpace.write; whether the pattern matches is the engine's to say."""
        return _text(action)


@dataclass(frozen=True, slots=True)
class JsonSpace:
    """An action is a JSON value valid under the schema; the engine holds completions to its grammar."""

    constraint: Constraint
    schema: Schema

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        if finish_reason != "stop":
            return None, ParseFailure("length", "The completion was cut before the JSON value was complete.")
        try:
            value = strict_json.parse(text)
            strict_json.dump(value)  # a value that could not be kept is none
            self.schema.validate(value)
        except SchemaMismatch as error:
            return None, ParseFailure("schema", str(error))
        except ValueError as error:
            return None, ParseFailure("json", str(error)[:500])
        return value, None

    def write(self, action: JsonValue) -> str:
        """As TextSpace.write. Patterns within the schema are not looked at."""
        try:
            self.schema.validate(action)
        except SchemaMismatch as error:
            raise ActionSpaceError(str(error)) from error
        return json.dumps(action, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class DiscreteSpace:
    """An action is one of `actions`, 2 to 1,024 distinct strings."""

    actions: tuple[str, ...]

    def write(self, action: JsonValue) -> str:
        """As TextSpace.write."""
        if action not in self.actions:
            raise ActionSpaceError(f"{str(action)[:100]!r} is not in the action space")
        return action


@dataclass(frozen=True, slots=True)
class RefusedSpace:
    """The space of an episode that was opened when it was accepted, and is not any more: the episode can only end."""

    reason: str
    constraint: Constraint | None = None

    def write(self, action: JsonValue) -> str:
        raise ActionSpaceError(self.reason)


ActionSpace = TextSpace | RegexSpace | JsonSpace | DiscreteSpace | RefusedSpace


def json_space(schema: dict[str, Any]) -> JsonSpace:
    """Raises ActionSpaceError for a schema that is too large, too deep, not a schema, or refers outside itself."""
    try:
        checked = Schema(schema)
    except SchemaRefused as error:
        raise ActionSpaceError(str(error)) from error
    return JsonSpace(Constraint("json", checked.text), checked)


def tools_space(tools: Sequence[dict[str, Any]]) -> JsonSpace:
    """An action is {"name", "arguments"}, valid under that tool's schema. Raises ActionSpaceError for names that clash,
    and for parameters that are no object's or that the grammar cannot hold a call to (strict_schema)."""
    names = [tool["name"] for tool in tools]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ActionSpaceError(f"two tools are named {twins[0]!r}")
    if len(json.dumps([tool.get("parameters") for tool in tools])) > MAX_SCHEMA_BYTES:
        raise ActionSpaceError(f"the tools' schemas are too large: more than {MAX_SCHEMA_BYTES} bytes")
    calls: list[dict[str, Any]] = []
    room = MAX_SCHEMA_BYTES
    for tool in tools:
        call = _call_schema(tool)
        room -= len(json.dumps(call))
        if room < 0:
            raise ActionSpaceError("the tools' schemas are too large with their references written out")
        calls.append(call)
    return json_space({"anyOf": calls})


def _call_schema(tool: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = strict(tool.get("parameters") or {"type": "object", "properties": {}})
    except SchemaRefused as error:
        raise ActionSpaceError(f"tool {tool['name']!r}: {error}") from error
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise ActionSpaceError(f"tool {tool['name']!r}: the parameters must be of type object")
    return {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _text(action: JsonValue) -> str:
    if not isinstance(action, str):
        raise ActionSpaceError("an action of this space is a string")
    return action


def regex_space(pattern: str) -> RegexSpace:
    """Raises ActionSpaceError for a pattern that is too long. Whether it compiles is the engine's to say."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ActionSpaceError(f"the pattern is {len(pattern)} characters long; at most {MAX_PATTERN_CHARS} are")
    return RegexSpace(Constraint("regex", pattern))


@lru_cache(maxsize=1024)
def discrete_space(actions: tuple[str, ...]) -> DiscreteSpace:
    """Raises ActionSpaceError unless there are 2 to 1,024 distinct, non-empty actions. Equal spaces are shared."""
    if not 2 <= len(actions) <= MAX_ACTIONS:
        raise ActionSpaceError(f"{len(actions)} actions; 2 to {MAX_ACTIONS} are allowed")
    if len(set(actions)) < len(actions):
        raise ActionSpaceError("actions must be distinct")
    if not all(actions):
        raise ActionSpaceError("an action must not be empty")
    return DiscreteSpace(actions)


@dataclass(frozen=True, slots=True)
class Branch:
    """A place in the trie where the model decides: the tokens so far, and the next ones there are.

    bounds: child i leads to the sorted sequences bounds[i]:bounds[i + 1].
    """

    path: tuple[int, ...]
    children: tuple[int, ...]
    bounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A drawn action. token_ids end with the terminator. drawn: 1 where the model decided. logprobs: one a token."""

    action: str
    token_ids: tuple[int, ...]
    drawn: bytes
    logprobs: tuple[float, ...]
    logprob: float
    probs: dict[str, float]


class DecisionTrie:
    """Actions as token sequences, each closed by the terminator, so that one action may be a prefix of another.

    The model is asked only at `branches`; every other token is forced. A distribution over actions is the product of
    the choices at the branches on the way, each renormalised over the tokens that lead to an action.
    """

    def __init__(self, actions: Sequence[str], encode: Callable[[str], list[int]], terminator: int) -> None:
        rows = sorted(((*encode(action), terminator), action) for action in actions)
        self.actions: tuple[str, ...] = tuple(action for _, action in rows)
        self.sequences: tuple[tuple[int, ...], ...] = tuple(ids for ids, _ in rows)
        for (ids, action), (other, twin) in pairwise(rows):
            if other[: len(ids)] == ids:
                raise ActionSpaceError(f"the policy's tokenizer cannot tell {action!r} and {twin!r} apart")
        self.branches: tuple[Branch, ...] = tuple(self._branches())
        self.max_len: int = max(map(len, self.sequences))

    def _branches(self) -> list[Branch]:
        found: list[Branch] = []
        pending = [(0, 0, len(self.sequences))]
        while pending:
            depth, low, high = pending.pop()
            while self.sequences[low][depth] == self.sequences[high - 1][depth] and high - low > 1:
                depth += 1
            if high - low == 1:
                continue
            starts = [i for i in range(low, high) if i == low or self._at(i, depth) != self._at(i - 1, depth)]
            bounds = (*starts, high)
            found.append(Branch(self.sequences[low][:depth], tuple(self._at(i, depth) for i in starts), bounds))
            pending.extend((depth + 1, a, b) for a, b in pairwise(bounds) if b - a > 1)
        return found

    def _at(self, row: int, depth: int) -> int:
        return self.sequences[row][depth]

    def distribution(self, scores: Sequence[Sequence[float]], sampling: Sampling) -> list[float]:
        """Probabilities of `actions`, in their order, given the logprobs of each branch's children.

        At temperature 0 this is the distribution at temperature 1, of which the most likely action is taken.
        """
        temperature = sampling.temperature or 1.0
        totals = [0.0] * len(self.actions)
        for branch, logprobs in zip(self.branches, scores, strict=True):
            top = max(logprobs)
            scaled = logprobs if top == -math.inf else [(value - top) / temperature for value in logprobs]
            for child, logprob in enumerate(log_softmax(scaled)):
                for row in range(branch.bounds[child], branch.bounds[child + 1]):
                    totals[row] += logprob
        return _filtered([math.exp(total) for total in totals], sampling)

    def draw(self, scores: Sequence[Sequence[float]], sampling: Sampling, generator: random.Random) -> Chosen:
        """Draws an action; `scores` holds the logprobs of each branch's children, in the order of `branches`."""
        probs = self.distribution(scores, sampling)
        rows = range(len(probs))
        row = generator.choices(rows, probs)[0] if sampling.temperature else max(rows, key=probs.__getitem__)
        drawn = bytearray(len(self.sequences[row]))
        logprobs = [0.0] * len(drawn)
        for branch in self.branches:
            if not branch.bounds[0] <= row < branch.bounds[-1]:
                continue
            child = next(i for i, end in enumerate(branch.bounds[1:]) if row < end)
            mass = sum(probs[branch.bounds[0] : branch.bounds[-1]])
            taken = sum(probs[branch.bounds[child] : branch.bounds[child + 1]])
            drawn[len(branch.path)] = 1
            logprobs[len(branch.path)] = math.log(min(taken / mass, 1.0))
        return Chosen(
            action=self.actions[row],
            token_ids=self.sequences[row],
            drawn=bytes(drawn),
            logprobs=tuple(logprobs),
            logprob=math.log(min(probs[row], 1.0)),
            probs=dict(zip(self.actions, probs, strict=True)),
        )


def log_softmax(values: Sequence[float]) -> list[float]:
    """Normalised logprobs. A branch the model gives nothing (all -inf) is uniform: its actions stay legal."""
    top = max(values)
    if top == -math.inf:
        return [-math.log(len(values))] * len(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def _filtered(probs: list[float], sampling: Sampling) -> list[float]:
    order = sorted(range(len(probs)), key=probs.__getitem__, reverse=True)
    keep = len(order) if sampling.top_k <= 0 else min(sampling.top_k, len(order))
    floor = sampling.min_p * probs[order[0]]
    mass = 0.0
    kept: set[int] = set()
    for row in order[:keep]:
        if kept and (probs[row] < floor or mass >= sampling.top_p):
            break
        kept.add(row)
        mass += probs[row]
    return [prob / mass if row in kept else 0.0 for row, prob in enumerate(probs)]
