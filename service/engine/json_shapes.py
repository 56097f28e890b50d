"""Finds out which values a JSON schema allows: as shapes, one for each type of value in each alternative.

A schema is split into alternatives without `anyOf`, `oneOf`, `allOf` and `$ref`. What the parts of an alternative
demand is intersected. A keyword that a grammar cannot enforce is refused or, if the schema is not strict, left to the
validation of the finished value.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.validation import formats, patterns, strict_json
from service.validation.json_schema import Budget, Schema, SchemaMismatch, SchemaRefused, Subschema
from service.validation.lark import is_empty
from service.validation.number_patterns import Bound
from service.validation.patterns import ANY_CHARACTER, PatternRefused, json_characters

_MAX_ALTERNATIVES = 512
_MAX_DISJOINT_DEPTH = 4
NO_TEXT = "/[a&&b]/"
_MAX_LENGTH = 10_000
"""The largest minimum of the length of a text, a list or an object."""
_UNREACHED_LENGTH = 100_000_000
"""A maximum above this is not written into the grammar. No model's context has room for such a value."""
_EXPANDED = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
"""Keywords that `Analysis` replaces by the subschemas that they refer to."""

Conjunction = tuple[Subschema, ...]
"""Subschemas that a value must satisfy together."""


@dataclass(frozen=True, slots=True)
class Values:
    """Exactly these values."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """Strings. `conditions` are expressions for the inside of the JSON string, and whether they must match or not."""

    conditions: tuple[tuple[bool, str], ...]
    least: int
    most: int | None

    def terminal(self, after: str = "") -> str:
        """Returns a terminal for the JSON string, followed by some other text."""
        if self.most is not None and self.least > self.most:
            return NO_TEXT
        found = [f'{"" if must_match else "~"}/"(?:{text})"{after}/' for must_match, text in self.conditions]
        if self.least or self.most is not None or not any(must_match for must_match, _ in self.conditions):
            times = f"{{{self.least},{'' if self.most is None else self.most}}}"
            found.append(f'/"{json_characters(ANY_CHARACTER)}{times}"{after}/')
        return " & ".join(found)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers that satisfy all bounds. `divided` are the subschemas with multipleOf."""

    lower: tuple[Bound, ...]
    upper: tuple[Bound, ...]
    is_integer: bool
    divided: Conjunction


@dataclass(frozen=True, slots=True)
class Items:
    """What one subschema demands of an array: of its first items, and of the others."""

    prefix: tuple[Subschema, ...]
    others: Subschema | None

    def of(self, index: int) -> Conjunction:
        """Returns what is demanded of an item."""
        if index < len(self.prefix):
            return (self.prefix[index],)
        return () if self.others is None else (self.others,)


@dataclass(frozen=True, slots=True)
class Arrays:
    layers: tuple[Items, ...]
    least: int
    most: int | None

    def of(self, index: int) -> Conjunction:
        """Returns what all subschemas demand of an item."""
        return distinct(part for layer in self.layers for part in layer.of(index))

    @property
    def num_first(self) -> int:
        """The number of items of which something special may be demanded."""
        return max((len(layer.prefix) for layer in self.layers), default=0)


@dataclass(frozen=True, slots=True)
class Properties:
    """What one subschema demands of an object's properties."""

    named: Mapping[str, Subschema]
    by_pattern: Mapping[str, Subschema]
    others: Subschema | None

    def of(self, name: str | None, matching: Iterable[str]) -> Conjunction:
        """Returns what is demanded of a property whose name matches these patterns; None for one that is not named."""
        found = [] if name is None or name not in self.named else [self.named[name]]
        found += [self.by_pattern[pattern] for pattern in matching if pattern in self.by_pattern]
        return tuple(found) or (() if self.others is None else (self.others,))


@dataclass(frozen=True, slots=True)
class Objects:
    """Objects. `names` is what propertyNames demands of the names. `counted` is a subschema with minProperties."""

    layers: tuple[Properties, ...]
    required: tuple[str, ...]
    names: Conjunction
    least: int
    most: int | None
    counted: Subschema | None

    def of(self, name: str) -> Conjunction:
        """Returns what all subschemas demand of a property."""
        matching = [pattern for pattern in self.patterns if patterns.matches(pattern, name, searches=True)]
        return distinct(part for layer in self.layers for part in layer.of(name, matching))

    def of_others(self, matching: Sequence[str]) -> Conjunction:
        """Returns what is demanded of properties that are not named anywhere, and whose names match these patterns."""
        return distinct(part for layer in self.layers for part in layer.of(None, matching))

    @property
    def patterns(self) -> list[str]:
        return list(dict.fromkeys(pattern for layer in self.layers for pattern in layer.by_pattern))

    @property
    def named(self) -> list[str]:
        """The names with a schema of their own, and the required names."""
        return list(dict.fromkeys([*(name for layer in self.layers for name in layer.named), *self.required]))


Shape = Values | Texts | Numbers | Arrays | Objects


_Shaped = tuple[Conjunction, list[Shape]]


def distinct(parts: Iterable[Subschema]) -> Conjunction:
    """Returns the subschemas without repetitions, and without those that demand nothing, in a fixed order."""
    found = {(part.index, part.schema is False): part for part in parts if part.schema not in (True, {})}
    return tuple(found[key] for key in sorted(found))


class Analysis:
    """Determines the shapes of the values that are valid under parts of one schema."""

    def __init__(self, schema: Schema, *, strict: bool, budget: Budget) -> None:
        """strict: whether a keyword that a grammar cannot enforce is refused."""
        self.schema = schema
        self.strict = strict
        self.budget = budget

    def shapes(self, conjunction: Conjunction) -> Iterator[Shape]:
        """Yields shapes; a value is valid if it has one of them. Raises SchemaRefused."""
        for parts in self._alternatives(conjunction):
            listed = next((part for part in parts if part.keywords.keys() & {"enum", "const"}), None)
            if listed is not None:
                yield Values(tuple(self._listed(listed, parts)))
            else:
                yield from _shapes(self, parts)

    def allows(self, conjunction: Conjunction, value: Any) -> bool:
        """Whether a value is valid under all of the subschemas. Raises SchemaRefused if that takes too long."""
        try:
            for part in conjunction:
                self.schema.validate(value, part, self.budget)
        except SchemaMismatch as error:
            if self.budget.left < 0:
                raise _too_long(conjunction) from error
            return False
        return True

    def refuse(self, part: Subschema, keyword: str, why: str = "cannot be enforced while the policy writes") -> None:
        """Refuses a keyword, unless the schema is not strict."""
        if self.strict:
            raise SchemaRefused(
                f'{part.where()}the keyword {keyword!r} {why}. With "strict": false, it is checked afterwards'
            )

    def _listed(self, part: Subschema, parts: Conjunction) -> Iterator[Any]:
        """Yields the values of a part's enum or const that are valid under all parts, and can be stored."""
        own_list = "enum" if "enum" in part.keywords else "const"
        demanding = [_without(other, _EXPANDED | ({own_list} if other is part else set[str]())) for other in parts]
        others = tuple(other for other in demanding if other.schema)
        for value in listed_values(part.keywords):
            self._spend(parts)
            if self.allows(others, value) and _can_be_stored(value):
                yield value

    def _alternatives(self, conjunction: Conjunction) -> list[Conjunction]:
        """Expands $ref, allOf, anyOf and oneOf. Returns the conjunctions of which a value must satisfy one."""
        found: list[Conjunction] = []
        pending = [(Conjunction(), [(part, Conjunction()) for part in conjunction])]
        while pending:
            done, todo = pending.pop()
            self._spend(conjunction)
            if len(found) + len(pending) > _MAX_ALTERNATIVES:
                raise SchemaRefused(
                    f"{conjunction[0].where()}anyOf and oneOf make more than {_MAX_ALTERNATIVES} alternatives"
                )
            if not todo:
                found.append(done)
                continue
            (part, origin), rest = todo[0], todo[1:]
            if part in origin:
                raise SchemaRefused(f"{part.where()}'$ref': the schema refers to itself without end")
            if part in done:
                pending.append((done, rest))
            elif part.schema is not False:
                more = [[(child, (*origin, part)) for child in children] for children in self._expanded(part)]
                pending += [((*done, part), [*children, *rest]) for children in reversed(more)]
        return found

    def _expanded(self, part: Subschema) -> list[list[Subschema]]:
        """Returns the alternatives that the subschema's applicators add to it."""
        also = part.children("allOf")
        if "$ref" in part.keywords:
            also.append(self.schema.resolve(part))
        alternatives = [also]
        for name in ("anyOf", "oneOf"):
            if name in part.keywords:
                branches = part.children(name)
                alternatives = [[*before, branch] for branch in branches for before in alternatives]
        if "oneOf" in part.keywords:
            self._check_disjoint(part)
        return alternatives

    # --- oneOf ---

    def _check_disjoint(self, part: Subschema) -> None:
        """Refuses oneOf if two of its schemas may be valid together."""
        if not self.strict:
            return
        loose = Analysis(self.schema, strict=False, budget=self.budget)
        branches = [((branch,), list(loose.shapes((branch,)))) for branch in part.children("oneOf")]
        pairs = ((one, other) for index, one in enumerate(branches) for other in branches[:index])
        if not all(loose.disjoint(one, other, _MAX_DISJOINT_DEPTH) for one, other in pairs):
            self.refuse(part, "oneOf", "cannot be enforced, because a value may match two of its schemas (use anyOf)")

    def disjoint(self, one: _Shaped, other: _Shaped, depth: int) -> bool:
        """Whether no value is valid under both conjunctions, given with their shapes; False if that is unknown."""
        self._spend(one[0])
        pair = one[0], other[0]
        return all(self._are_disjoint(left, right, pair, depth) for left in one[1] for right in other[1])

    def _are_disjoint(self, left: Shape, right: Shape, pair: tuple[Conjunction, Conjunction], depth: int) -> bool:
        match left, right:
            case Values(values), _:
                return not any(self.allows(pair[1], value) for value in values)
            case _, Values(values):
                return not any(self.allows(pair[0], value) for value in values)
            case Numbers(), Numbers():
                return _is_gap(left.lower, right.upper) or _is_gap(right.lower, left.upper)
            case Texts(), Texts():
                return is_empty(f"{left.terminal()} & {right.terminal()}")
            case Objects(), Objects():
                return any(
                    self._property_differs(left, right, name, depth) for name in (*left.required, *right.required)
                )
            case _:
                return type(left) is not type(right)

    def _property_differs(self, left: Objects, right: Objects, name: str, depth: int) -> bool:
        """Whether no value of a property, which at least one of the two requires, fits both."""
        if name in left.required and name in right.required:
            if depth == 0:
                return False
            one, other = left.of(name), right.of(name)
            return self.disjoint((one, list(self.shapes(one))), (other, list(self.shapes(other))), depth - 1)
        optional = right if name in left.required else left
        return any(part.schema is False for part in optional.of(name))

    def _spend(self, conjunction: Conjunction) -> None:
        self.budget.left -= 1
        if self.budget.left < 0:
            raise _too_long(conjunction)


def _without(part: Subschema, keywords: frozenset[str] | set[str]) -> Subschema:
    """Returns the subschema without these keywords."""
    if part.keywords.keys() & {"unevaluatedProperties", "unevaluatedItems"}:
        return part  # these depend on the keywords beside them
    kept = {name: value for name, value in part.keywords.items() if name not in keywords}
    return replace(part, schema=kept)


def _too_long(conjunction: Conjunction) -> SchemaRefused:
    where = conjunction[0].where() if conjunction else ""
    return SchemaRefused(f"{where}the schema takes too long to compile; use a simpler schema")


def _is_gap(lower: tuple[Bound, ...], upper: tuple[Bound, ...]) -> bool:
    return any(
        low > high or (low == high and (low_is_open or high_is_open))
        for low, low_is_open in lower
        for high, high_is_open in upper
    )


def _can_be_stored(value: Any) -> bool:
    try:
        strict_json.dump(value)
    except ValueError:
        return False
    return True


# --- Shapes of one alternative ---

_TYPES: tuple[str, ...] = ("null", "boolean", "number", "string", "array", "object")
_NEVER_ENFORCED = frozenset({"if", "$dynamicRef", "$recursiveRef"})


def _shapes(analysis: Analysis, parts: Conjunction) -> Iterator[Shape]:
    """Yields the shapes for subschemas whose applicators are expanded, and that list no values."""
    types, is_integer = _allowed_types(parts)
    excluded = _excluded(analysis, parts, types)
    for part in parts:
        for keyword in part.keywords.keys() & _NEVER_ENFORCED:
            if keyword != "if" or part.keywords.keys() & {"then", "else"}:
                analysis.refuse(part, keyword)
    if "null" in types and None not in excluded:
        yield Values((None,))
    if "boolean" in types:
        yield Values(tuple(value for value in (True, False) if not any(value is other for other in excluded)))
    if "number" in types:
        yield _numbers(parts, is_integer=is_integer)
    if "string" in types:
        yield _texts(analysis, parts, [value for value in excluded if isinstance(value, str)])
    if "array" in types:
        yield _arrays(analysis, parts)
    if "object" in types:
        yield _objects(analysis, parts)


def _allowed_types(parts: Conjunction) -> tuple[set[str], bool]:
    """Returns the types that all parts allow, and whether numbers must be integers."""
    types, is_integer = set(_TYPES), False
    for part in parts:
        names = _listed_types(part.keywords.get("type", list(_TYPES)))
        is_integer |= "integer" in names and "number" not in names
        types &= names | ({"number"} if "integer" in names else set())
    return types, is_integer


def _excluded(analysis: Analysis, parts: Conjunction, types: set[str]) -> list[Any]:
    """Applies `not` where it can be: removes types, and returns values that are excluded."""
    values: list[Any] = []
    for part in parts:
        if part.keywords.get("not", False) is False:
            continue
        forbidden = part.child("not").keywords
        words = forbidden.keys()
        if not words:
            types.clear()
        elif words == {"type"} and "integer" not in (names := _listed_types(forbidden["type"])):
            types -= names
        elif words in ({"enum"}, {"const"}) and all(
            map(_is_simple, listed := forbidden.get("enum", [forbidden.get("const")]))
        ):
            values += listed
        elif types:
            analysis.refuse(part, "not")
    return values


def _listed_types(given: str | list[str]) -> set[str]:
    return {given} if isinstance(given, str) else set(given)


def listed_values(keywords: Mapping[str, Any]) -> list[Any]:
    """Returns the values of enum or const."""
    return keywords["enum"] if "enum" in keywords else [keywords["const"]]


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, str | bool)


def _numbers(parts: Conjunction, *, is_integer: bool) -> Numbers:
    return Numbers(
        _bounds(parts, "minimum", "exclusiveMinimum"),
        _bounds(parts, "maximum", "exclusiveMaximum"),
        is_integer,
        tuple(part for part in parts if "multipleOf" in part.keywords),
    )


def _bounds(parts: Conjunction, closed: str, opened: str) -> tuple[Bound, ...]:
    found = [(part.keywords[closed], False) for part in parts if closed in part.keywords]
    found += [(part.keywords[opened], True) for part in parts if opened in part.keywords]
    return tuple(found)


def _texts(analysis: Analysis, parts: Conjunction, excluded: list[str]) -> Texts:
    conditions: list[tuple[bool, str]] = [(False, _inside(value)) for value in excluded]
    for part in parts:
        if "pattern" in part.keywords:
            conditions += _parsed(part, "pattern", part.keywords["pattern"])
        name = part.keywords.get("format", "")
        if name in formats.PATTERNS:
            conditions += _format_conditions(name)
        elif name in formats.REFUSED:
            analysis.refuse(part, "format", f"cannot be enforced for {name!r}")
    least, most = _range(analysis, parts, "minLength", "maxLength")
    return Texts(tuple(conditions), least, most)


def _inside(text: str) -> str:
    return "".join(json_characters(((ord(character), ord(character)),)) for character in text)


def _parsed(part: Subschema, keyword: str, pattern: str) -> list[tuple[bool, str]]:
    """Returns the conditions of a pattern. Raises SchemaRefused, strict or not, because nothing else could check it."""
    try:
        return patterns.parse(pattern, searches=True).conditions(json_characters)
    except PatternRefused as error:
        raise SchemaRefused(f"{part.where()}the keyword {keyword!r}, {pattern[:100]!r}: {error}") from error


def _format_conditions(name: str) -> list[tuple[bool, str]]:
    parsed = patterns.parse(formats.PATTERNS[name], searches=False, max_chars=patterns.MAX_FORMAT_CHARS)
    return parsed.conditions(json_characters)


def _range(analysis: Analysis, parts: Conjunction, low: str, high: str) -> tuple[int, int | None]:
    """Returns the strictest of several minimums and maximums; None for no maximum, or one that no value reaches."""
    least = 0
    for part in parts:
        if math.ceil(part.keywords.get(low, 0)) > _MAX_LENGTH:
            analysis.refuse(part, low, f"cannot be enforced above {_MAX_LENGTH:,}")
        else:
            least = max(least, math.ceil(part.keywords.get(low, 0)))
    most = min((math.floor(part.keywords[high]) for part in parts if high in part.keywords), default=None)
    return least, None if most is None or most > _UNREACHED_LENGTH else most


def _arrays(analysis: Analysis, parts: Conjunction) -> Arrays:
    least, most = _range(analysis, parts, "minItems", "maxItems")
    layers: list[Items] = []
    for part in parts:
        words = part.keywords
        if words.get("uniqueItems") and (most is None or most > 1):
            analysis.refuse(part, "uniqueItems")
        if "contains" in words and (words.get("minContains", 1) > 0 or "maxContains" in words):
            analysis.refuse(part, "contains")
        if words.get("unevaluatedItems", True) not in (True, {}):
            analysis.refuse(part, "unevaluatedItems")
        others = part.child("items", "[]") if "items" in words else None
        layers.append(Items(tuple(part.children("prefixItems", "[]")), others))
    return Arrays(tuple(layers), least, most)


def _objects(analysis: Analysis, parts: Conjunction) -> Objects:
    least, most = _range(analysis, parts, "minProperties", "maxProperties")
    required: list[str] = []
    layers: list[Properties] = []
    for part in parts:
        words = part.keywords
        required += words.get("required", ())
        if any(words.get("dependentRequired", {}).values()):
            analysis.refuse(part, "dependentRequired")
        if any(schema not in (True, {}) for schema in words.get("dependentSchemas", {}).values()):
            analysis.refuse(part, "dependentSchemas")
        for pattern in words.get("patternProperties", ()):
            _parsed(part, "patternProperties", pattern)
        if words.get("unevaluatedProperties", True) not in (True, {}):
            analysis.refuse(part, "unevaluatedProperties")
        others = part.child("additionalProperties", ".*") if "additionalProperties" in words else None
        layers.append(Properties(part.named("properties"), part.named("patternProperties", "*"), others))
    names = tuple(part.child("propertyNames") for part in parts if "propertyNames" in part.keywords)
    counted = next((part for part in parts if "minProperties" in part.keywords), None)
    return Objects(tuple(layers), tuple(dict.fromkeys(required)), distinct(names), least, most, counted)
