"""Compiles JSON schemas into a grammar for llguidance that derives exactly the valid values.

Each value has one text: the properties of an object come in the order of the schema, there is no white space, and
characters are escaped only where JSON requires it. Numbers have a bounded number of digits (`number_patterns`).
docs/api.md lists the keywords that are refused.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from itertools import combinations
from typing import Any

from service.engine.json_shapes import Analysis, Arrays, Conjunction, Numbers, Objects, Shape, Texts, Values, distinct
from service.validation import patterns
from service.validation.json_schema import Budget, Schema, SchemaRefused
from service.validation.lark import Grammar, Part, Repeated, is_empty
from service.validation.number_patterns import (
    floats,
    integer_range,
    integers,
    lower_floats,
    upper_floats,
)
from service.validation.patterns import json_characters, text_characters

_MAX_RULES = 20_000
_MAX_LISTED = 1000
"""Maximum number of multiples of a number that are listed one by one."""
_MAX_KEY_PATTERNS = 5
_MAX_COUNTED = 20_000


def compiled(schema: Schema, *, strict: bool) -> str:
    """Returns a grammar for the values that are valid under a schema.

    strict: whether a keyword that the grammar cannot enforce is refused.

    Raises SchemaRefused.
    """
    grammar = Grammar()
    return grammar.text(grammar_rule(grammar, schema, strict=strict))


def compiled_calls(tools: Sequence[tuple[str, Schema, bool]]) -> str:
    """Returns a grammar for calls of these tools: name, schema of the arguments, whether it is strict."""
    grammar = Grammar()
    start, budget = grammar.new_rule(), Budget()
    for name, schema, strict in tools:
        arguments = grammar_rule(grammar, schema, strict=strict, budget=budget)
        opening = json.dumps({"name": name}, ensure_ascii=False, separators=(",", ":"))[:-1] + ',"arguments":'
        grammar.add(start, [[grammar.terminal(f"/{_expression(opening)}/"), arguments, '"}"']])
    return grammar.text(start)


def compiled_pattern(pattern: str) -> str:
    """Returns a grammar for the texts that a pattern matches in full. Raises PatternRefused, or ValueError if there is
    no such text."""
    conditions = patterns.parse(pattern, searches=False).conditions(text_characters)
    terminal = " & ".join(f"{'' if must_match else '~'}/{text}/" for must_match, text in conditions)
    if is_empty(terminal):
        raise ValueError("no text matches it")
    return f"%llguidance {{}}\nstart: T\nT: {terminal}"


def grammar_rule(grammar: Grammar, schema: Schema, *, strict: bool, budget: Budget | None = None) -> str:
    """Adds the rules for a schema to a grammar. Returns the first, which derives a text. Raises SchemaRefused."""
    return _Compiler(grammar, Analysis(schema, strict=strict, budget=budget or Budget())).rules()


class _Compiler:
    """Writes the rules for the schemas of one root."""

    def __init__(self, grammar: Grammar, analysis: Analysis) -> None:
        self._grammar = grammar
        self._analysis = analysis
        self._rules: dict[Conjunction, str] = {}
        self._pending: list[tuple[str, Conjunction]] = []

    def rules(self) -> str:
        """Writes the rules for the root and for all that it refers to. Returns the first."""
        start = self._rule(distinct([self._analysis.schema.root]))
        while self._pending:
            rule, conjunction = self._pending.pop()
            try:
                for shape in self._analysis.shapes(conjunction):
                    self._grammar.add(rule, self._alternatives(shape))
            except ValueError as error:
                if isinstance(error, SchemaRefused):
                    raise
                raise SchemaRefused(f"{_where(conjunction)}{error}") from error
        if not self._grammar.derives(start):
            raise SchemaRefused(self._why_empty(start))
        return start

    def _why_empty(self, start: str) -> str:
        """Returns the place and the keywords because of which no value is valid."""
        conjunctions = {rule: conjunction for conjunction, rule in self._rules.items()}
        known = [conjunctions[rule] for rule in self._grammar.dead_ends(start) if rule in conjunctions]
        keywords = dict.fromkeys(keyword for part in known[-1] for keyword in part.keywords)
        listed = f"the keyword{'s' * (len(keywords) > 1)} {', '.join(map(repr, keywords))}"[:300]
        return f"{_where(known[-1])}no value is valid under {listed if keywords else 'the schema false'}"

    def _rule(self, conjunction: Conjunction) -> str:
        """Returns the rule for the values that satisfy the conjunction. It is written later."""
        if conjunction not in self._rules:
            if self._grammar.num_rules > _MAX_RULES:
                raise SchemaRefused("the schema is too large once it is compiled; use a simpler schema")
            self._rules[conjunction] = self._grammar.new_rule()
            self._pending.append((self._rules[conjunction], conjunction))
        return self._rules[conjunction]

    def _alternatives(self, shape: Shape) -> Iterable[list[Part]]:
        match shape:
            case Values(values):
                terminal = f"/{'|'.join(dict.fromkeys(map(_literal, values)))}/"
                return [[self._grammar.terminal(terminal)]] if values else []
            case Texts():
                terminal = shape.terminal()
                return [] if is_empty(terminal) else [[self._grammar.terminal(terminal)]]
            case Numbers():
                terminal = self._number(shape)
                return [[self._grammar.terminal(terminal)]] if terminal else []
            case Arrays():
                return [['"["', self._items(shape), '"]"']]
            case Objects():
                return [['"{"', properties, '"}"'] for properties in self._properties(shape)]

    # --- Arrays ---

    def _items(self, shape: Arrays) -> str:
        """Returns a rule for the items of an array."""
        num_first = shape.num_first if shape.most is None else min(shape.num_first, shape.most)
        start = rule = self._grammar.new_rule()
        for index in range(num_first):
            rest = self._grammar.new_rule()
            if index >= shape.least:
                self._grammar.add(rule, [[]])
            self._grammar.add(rule, [[*_comma(index), self._rule(shape.of(index)), rest]])
            rule = rest
        least = max(shape.least - num_first, 0)
        most = None if shape.most is None else shape.most - num_first
        if not least:
            self._grammar.add(rule, [[]])
        if most != 0 and (most is None or most >= least):
            item, more = self._rule(shape.of(num_first)), self._grammar.new_rule()
            self._grammar.add(more, [['","', item]])
            others = Repeated(more, max(least - 1, 0), None if most is None else most - 1)
            self._grammar.add(rule, [[*_comma(num_first), item, others]])
        return start

    # --- Objects ---

    def _properties(self, shape: Objects) -> Iterator[str]:
        """Yields a rule for the properties of an object; none if no object is valid."""
        listed, others = self._names(shape)
        least, most = shape.least, shape.most
        if not set(shape.required) <= set(listed) or (least > len(listed) and others is None):
            return
        if others and shape.counted and least > max(1, len(shape.required) + 1):
            # The other properties may repeat a name, so that only the first of them certainly counts.
            self._analysis.refuse(shape.counted, "minProperties", "cannot be enforced where names are not listed")
            least = 0
        counted = max(1, least, 0 if most is None or (not others and most >= len(listed)) else most)
        if counted * len(listed) > _MAX_COUNTED:
            raise ValueError("the keywords 'minProperties' and 'maxProperties' are too large for so many properties")
        pairs = [(self._pair(name, shape.of(name)), name in shape.required) for name in listed]
        yield self._chain(pairs, others, range(least, counted), most)

    def _names(self, shape: Objects) -> tuple[list[str], str | None]:
        """Returns the names of which something special is demanded, and a rule for properties with other names; None if
        there are none."""
        demands = list(self._analysis.shapes(shape.names))
        names = [value for demand in demands if isinstance(demand, Values) and shape.names for value in demand.values]
        texts = [demand.terminal(":") for demand in demands if isinstance(demand, Texts)]
        known = list(dict.fromkeys([*shape.named, *(name for name in names if isinstance(name, str))]))
        taken = [f"~/{'|'.join(_expression(_key(name)) for name in known)}/"] if known else []
        listed = [name for name in known if self._analysis.allows(shape.names, name)]
        return listed, self._other(shape, " & ".join([f"({' | '.join(texts)})", *taken])) if texts else None

    def _other(self, shape: Objects, names: str) -> str | None:
        """Returns a rule for a property whose name is not listed; None if there can be none."""
        known = shape.patterns
        if len(known) > _MAX_KEY_PATTERNS:
            raise ValueError(f"the keyword 'patternProperties' is supported for up to {_MAX_KEY_PATTERNS} patterns")
        alternatives: list[list[Part]] = []
        for matching in (some for size in range(len(known) + 1) for some in combinations(known, size)):
            demanded = shape.of_others(matching)
            keys = " & ".join([names, *(_key_condition(pattern, is_met=pattern in matching) for pattern in known)])
            if not any(part.schema is False for part in demanded) and not is_empty(keys):
                alternatives.append([self._grammar.terminal(keys), self._rule(demanded)])
        if not alternatives:
            return None
        rule = self._grammar.new_rule()
        self._grammar.add(rule, alternatives)
        return rule

    def _pair(self, name: str, conjunction: Conjunction) -> list[Part]:
        return [self._grammar.terminal(f"/{_expression(_key(name))}/"), self._rule(conjunction)]

    def _chain(self, pairs: list[tuple[list[Part], bool]], others: str | None, counted: range, most: int | None) -> str:
        """Returns a rule for properties in order: `pairs`, each with whether it is required, and then `others`.

        A state is the index of the next property, and how many were written. `counted` goes from the minimum to the
        number up to which they are counted.
        """
        least, states, pending = counted.start, dict[tuple[int, int], str](), list[tuple[int, int]]()

        def state(index: int, count: int) -> str:
            key = (index, min(count, counted.stop))
            if key not in states:
                states[key] = self._grammar.new_rule()
                pending.append(key)
            return states[key]

        start = state(0, 0)
        while pending:
            index, count = pending.pop()
            rule, has_room = states[index, count], most is None or count < most
            if index < len(pairs):
                pair, is_required = pairs[index]
                if has_room:
                    self._grammar.add(rule, [[*_comma(count), *pair, state(index + 1, count + 1)]])
                if not is_required:
                    self._grammar.add(rule, [[state(index + 1, count)]])
                continue
            if count >= least:
                self._grammar.add(rule, [[]])
            if others and has_room and count + 1 >= least:
                more = self._grammar.new_rule()
                self._grammar.add(more, [['","', others]])
                rest = Repeated(more, 0, None if most is None else most - count - 1)
                self._grammar.add(rule, [[*_comma(count), others, rest]])
        return start

    # --- Numbers ---

    def _number(self, shape: Numbers) -> str | None:
        """Returns a terminal for numbers; None if there are none."""
        steps = [Fraction(repr(part.keywords["multipleOf"])) for part in shape.divided]
        step = reduce(_common_multiple, steps) if steps else None
        low, high = integer_range(shape.lower, shape.upper)
        whole = f"/{integers(low, high)}/" if low <= high else None
        if shape.is_integer or (step is not None and step.denominator == 1):
            step = int(_common_multiple(step or Fraction(1), Fraction(1)))
            return whole and self._multiples(shape, whole, range(low, high + 1), step)
        first, last = max(lower_floats(shape.lower)), min(upper_floats(shape.upper))
        found = [whole] if whole else []
        found += [f"/{floats(first, last)}/"] if first <= last else []
        terminal = " | ".join(found)
        return self._decimals(shape, f"({terminal})", (first, last), step) if terminal and step else terminal or None

    def _multiples(self, shape: Numbers, whole: str, numbers: range, step: int) -> str | None:
        """Returns a terminal for the integers of a range that are multiples of `step`."""
        if step == 1:
            return whole
        first = -(-numbers.start // step) * step
        if (numbers.stop - first) // step < _MAX_LISTED:
            return _listed(range(first, numbers.stop, step))
        for num_digits in (1, 2, 3):
            if 10**num_digits % step == 0:
                endings = range(0, 10**num_digits, step)
                long = "|".join(f"{ending:0{num_digits}}" for ending in endings)
                return f"{whole} & /-?(?:{'|'.join(map(str, endings))}|[0-9]+(?:{long}))/"
        self._analysis.refuse(shape.divided[0], "multipleOf")
        return whole

    def _decimals(self, shape: Numbers, terminal: str, span: tuple[float, float], step: Fraction) -> str | None:
        """Returns a terminal for the decimal numbers that are multiples of `step`, which is not whole."""
        low, high = (Fraction(repr(bound)) for bound in span)
        first, last = math.ceil(low / step), math.floor(high / step)
        num_digits = next((n for n in range(1, 10) if 10**n % step.denominator == 0), None)
        if num_digits is not None and last - first < _MAX_LISTED:
            return _listed(
                f"{Decimal(number * step.numerator) / step.denominator:f}" for number in range(first, last + 1)
            )
        if num_digits is None or step.numerator != 1 or step.denominator > _MAX_LISTED != 10**num_digits:
            self._analysis.refuse(shape.divided[0], "multipleOf")
            return terminal
        fractions = f"[0-9]{{1,{num_digits}}}"
        if step.denominator != 10**num_digits:
            decimals = (f"{10**num_digits // step.denominator * n:0{num_digits}}" for n in range(step.denominator))
            fractions = "|".join(f"{digits.rstrip('0') or '0'}0*" for digits in decimals)
        # A float from 1e16 on is a whole number.
        large = r"[0-9](?:\.[0-9]+)?[eE]\+?(?:1[6-9]|[2-9][0-9]|[1-3][0-9]{2})"
        return f"{terminal} & /-?(?:[0-9]+(?:\\.(?:{fractions}))?|{large})/"


def _common_multiple(one: Fraction, other: Fraction) -> Fraction:
    numerator = math.lcm(one.numerator * other.denominator, other.numerator * one.denominator)
    return Fraction(numerator, one.denominator * other.denominator)


def _where(conjunction: Conjunction) -> str:
    return conjunction[0].where() if conjunction else ""


def _comma(count: int) -> list[Part]:
    return ['","'] if count else []


def _listed(numbers: Iterable[object]) -> str | None:
    texts = [_expression(str(number)) for number in numbers]
    return f"/{'|'.join(texts)}/" if texts else None


def _key(name: str) -> str:
    return json.dumps(name, ensure_ascii=False) + ":"


def _literal(value: Any) -> str:
    return _expression(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _expression(text: str) -> str:
    """Returns an expression that matches exactly this text."""
    return "".join(text_characters(((ord(character), ord(character)),)) for character in text)


def _key_condition(pattern: str, *, is_met: bool) -> str:
    """Returns a terminal for the names, with a colon, that match a pattern, or for those that do not."""
    conditions = patterns.parse(pattern, searches=True).conditions(json_characters)
    terminal = Texts(tuple(conditions), 0, None).terminal(":")
    return f"({terminal})" if is_met else f"~({terminal})"
