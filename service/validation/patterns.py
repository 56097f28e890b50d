"""Translates regular expressions of ECMA-262, which JSON Schema uses, into expressions that llguidance enforces.

llguidance matches in linear time, on whole strings, without assertions. It supports the intersection and the complement
of expressions. Therefore `^`, `$` and lookaheads at the start are resolved here. A construct that is no regular
expression in this sense (backreferences, other lookarounds, word boundaries) is refused by name.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from service.validation import lark

MAX_PATTERN_CHARS = 4096
MAX_FORMAT_CHARS = 10_000
"""Maximum length of the patterns of `formats`."""
MAX_REPETITIONS = 10_000
_MAX_NESTING = 50

Ranges = tuple[tuple[int, int], ...]
"""A set of characters: sorted, disjoint ranges of code points, both ends included."""
Render = Callable[[Ranges], str]
"""Returns an expression for one character of the set."""


class PatternRefused(ValueError):
    """The pattern is invalid or not supported. The message says why."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Sequence:
    """All parts, one after the other."""

    parts: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the alternatives."""

    alternatives: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`part`, from `least` to `most` times; None for no limit."""

    part: "Node"
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Anchor:
    """The start of the text, or its end."""

    is_start: bool


@dataclass(frozen=True, slots=True)
class Lookahead:
    """An assertion that the text from here on starts with `part`, or that it does not."""

    part: "Node"
    negative: bool


Node = Chars | Sequence | Choice | Repeat | Anchor | Lookahead


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern. A text matches if `node` matches all of it or, if `searches`, a part of it."""

    node: Node
    searches: bool

    def conditions(self, render: Render) -> list[tuple[bool, str]]:
        """Returns expressions for whole texts; a text matches the pattern if it matches those that are marked True, and
        none of those that are marked False. Raises PatternRefused."""
        node, found = self.node, list[tuple[bool, str]]()
        if isinstance(node, Sequence):
            looks = _leading_lookaheads(node.parts, at_start=not self.searches)
            for look in looks:
                searched = _whole(Sequence((Anchor(is_start=True), look.part)), render, searches=True)
                found.append((not look.negative, searched))
            node = Sequence(tuple(part for part in node.parts if not any(part is look for look in looks)))
        found.append((True, _whole(node, render, searches=self.searches)))
        if sum(len(text) for _, text in found) > _MAX_EXPRESSION_CHARS:
            raise PatternRefused("the pattern is too large once its classes and anchors are written out")
        return found


def parse(pattern: str, *, searches: bool, max_chars: int = MAX_PATTERN_CHARS) -> Pattern:
    """Parses a pattern.

    searches: whether it may match a part of the text, as in JSON Schema; otherwise it must match the whole text.

    Raises PatternRefused.
    """
    if len(pattern) > max_chars:
        raise PatternRefused(f"the pattern is {len(pattern)} characters long; at most {max_chars} are allowed")
    parsed = Pattern(_Parser(pattern).parse(), searches)
    parsed.conditions(text_characters)  # refuses assertions that cannot be resolved
    return parsed


def _leading_lookaheads(parts: tuple[Node, ...], *, at_start: bool) -> list[Lookahead]:
    """Returns the lookaheads of a sequence that are tested at the start of the text."""
    found: list[Lookahead] = []
    for part in parts:
        if isinstance(part, Anchor) and part.is_start:
            at_start = True
        elif isinstance(part, Lookahead) and at_start:
            found.append(part)
        else:
            break
    return found


# --- Sets of characters ---

_MAX_CODE_POINT = 0x10FFFF
_SURROGATES = ((0xD800, 0xDFFF),)


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def without(ranges: Iterable[tuple[int, int]], removed: Iterable[tuple[int, int]]) -> Ranges:
    """Returns the characters of a set that are not in another."""
    left = list(_merged(ranges))
    for low, high in _merged(removed):
        left = [
            part
            for start, end in left
            for part in ((start, min(end, low - 1)), (max(start, high + 1), end))
            if part[0] <= part[1]
        ]
    return tuple(left)


ANY_CHARACTER = without([(0, _MAX_CODE_POINT)], _SURROGATES)


def _of(*characters: str) -> Ranges:
    return _merged((ord(item[0]), ord(item[-1])) for item in characters)


def _inverse(ranges: Ranges) -> Ranges:
    return without(ANY_CHARACTER, ranges)


_DIGITS = ((0x30, 0x39),)
_WORD = _merged([*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_LINE_ENDS = _of("\n", "\r", "\u2028", "\u2029")
_SPACE = _merged(
    [*_LINE_ENDS, *_of("\t\x0c", " ", "\xa0", "\u1680", "\u2000\u200a", "\u202f", "\u205f", "\u3000", "\ufeff")]
)
_SHORTHANDS = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_CATEGORIES = frozenset(
    [
        *("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd", "Ps", "Pe"),
        *("Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "Cc", "Cf"),
    ]
)
_LONG_NAMES = {
    **{"Letter": "L", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Titlecase_Letter": "Lt"},
    **{"Modifier_Letter": "Lm", "Other_Letter": "Lo", "Mark": "M", "Combining_Mark": "M", "Nonspacing_Mark": "Mn"},
    **{"Spacing_Mark": "Mc", "Enclosing_Mark": "Me", "Number": "N", "Decimal_Number": "Nd", "digit": "Nd"},
    **{"Letter_Number": "Nl", "Other_Number": "No", "Punctuation": "P", "punct": "P", "Connector_Punctuation": "Pc"},
    **{"Dash_Punctuation": "Pd", "Open_Punctuation": "Ps", "Close_Punctuation": "Pe", "Initial_Punctuation": "Pi"},
    **{"Final_Punctuation": "Pf", "Other_Punctuation": "Po", "Symbol": "S", "Math_Symbol": "Sm"},
    **{"Currency_Symbol": "Sc", "Modifier_Symbol": "Sk", "Other_Symbol": "So", "Separator": "Z"},
    **{"Space_Separator": "Zs", "Line_Separator": "Zl", "Paragraph_Separator": "Zp", "Control": "Cc", "cntrl": "Cc"},
    "Format": "Cf",
}
"""The other names of the categories in ECMA-262."""


@lru_cache(maxsize=64)
def _category(name: str) -> Ranges:
    """Returns the characters of a Unicode general category."""
    points = (point for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point)).startswith(name))
    runs = (list(run) for _, run in groupby(enumerate(points), lambda pair: pair[1] - pair[0]))
    return tuple((run[0][1], run[-1][1]) for run in runs)


def text_characters(ranges: Ranges) -> str:
    """A `Render` for plain text."""
    if not ranges:
        return "(?:[a&&b])"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _escaped(ranges[0][0])
    return "[" + "".join(_escaped(low) + ("" if low == high else "-" + _escaped(high)) for low, high in ranges) + "]"


_SHORT_ESCAPES = {0x22: '"', 0x5C: "\\\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
_ESCAPED_IN_JSON = _merged([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])


@lru_cache(maxsize=256)
def json_characters(ranges: Ranges) -> str:
    """A `Render` for the inside of a JSON string. Each character has exactly one form; json.dumps with
    ensure_ascii=False writes the same one."""
    plain = without(ranges, _ESCAPED_IN_JSON)
    found = [text_characters(plain)] if plain else []
    escaped = [point for low, high in ranges for point in range(low, min(high, 0x5C) + 1) if _is_escaped(point)]
    found += [r"\\" + _SHORT_ESCAPES.get(point, f"u{point:04x}") for point in escaped]
    return f"(?:{'|'.join(found)})" if found else text_characters(())


def _is_escaped(point: int) -> bool:
    return point < 0x20 or point in (0x22, 0x5C)


def _escaped(point: int) -> str:
    character = chr(point)
    return character if character.isascii() and character.isalnum() else f"\\x{{{point:x}}}"


# --- Rendering ---


def _plain(node: Node, render: Render) -> str:
    """Renders a node without assertions."""
    match node:
        case Chars(ranges):
            return render(ranges)
        case Sequence(parts):
            return "".join(_plain(part, render) for part in parts)
        case Choice(alternatives):
            return f"(?:{'|'.join(_plain(part, render) for part in alternatives)})"
        case Repeat(part, least, most):
            return f"(?:{_plain(part, render)}){{{least},{'' if most is None else most}}}"
        case _:
            raise AssertionError("an assertion is not plain")


Flags = tuple[bool, bool]
"""Whether a match asserts the start of the text, and its end."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What a node matches, by the assertions that it makes there: (at the start of the text, at its end).

    empty: the assertions under which it matches the empty text.
    full: an expression for each combination of assertions; it may match the empty text, too.
    """

    empty: frozenset[Flags]
    full: dict[Flags, list[str]]


_NOTHING: Flags = (False, False)
_MAX_EXPRESSION_CHARS = 100_000


def _whole(node: Node, render: Render, *, searches: bool) -> str:
    """Returns an expression for all texts that the node matches, in full or (`searches`) in part."""
    rest = f"(?:{render(ANY_CHARACTER)})*"
    if not _has_assertion(node):
        plain = f"(?:{_plain(node, render)})"
        return f"{rest}{plain}{rest}" if searches else plain
    pieces = _pieces(node, render)
    found = [
        ("" if at_start or not searches else rest) + f"(?:{'|'.join(texts)})" + ("" if at_end or not searches else rest)
        for (at_start, at_end), texts in pieces.full.items()
    ]
    if any(flags != (True, True) for flags in pieces.empty) and searches:
        found.append(rest)
    elif pieces.empty:
        found.append("")
    return f"(?:{'|'.join(found)})" if found else render(())


def _has_assertion(node: Node) -> bool:
    match node:
        case Chars():
            return False
        case Sequence(parts) | Choice(parts):
            return any(_has_assertion(part) for part in parts)
        case Repeat(part):
            return _has_assertion(part)
        case _:
            return True


def _pieces(node: Node, render: Render) -> _Pieces:
    if not _has_assertion(node):
        return _Pieces(frozenset({_NOTHING} if _is_nullable(node) else ()), {_NOTHING: [_plain(node, render)]})
    match node:
        case Anchor(is_start):
            return _Pieces(frozenset({(is_start, not is_start)}), {})
        case Sequence(parts):
            pieces = _Pieces(frozenset({_NOTHING}), {})
            for asserts, run in groupby(parts, _has_assertion):
                for part in run if asserts else [Sequence(tuple(run))]:
                    pieces = _joined(pieces, _pieces(part, render))
            return pieces
        case Choice(alternatives):
            found = [_pieces(part, render) for part in alternatives]
            texts = _collected((flags, texts) for piece in found for flags, texts in piece.full.items())
            return _Pieces(frozenset[Flags]().union(*(piece.empty for piece in found)), texts)
        case Repeat(part, least, most) if most is not None and most <= 1:
            once = _pieces(part, render) if most else _Pieces(frozenset(), {})
            return once if least else _Pieces(once.empty | {_NOTHING}, once.full)
        case Repeat():
            raise PatternRefused("an anchor (^ or $) or a lookahead inside a repetition is not supported")
        case _:
            raise PatternRefused("a lookahead, (?=...) or (?!...), is supported only at the start of the pattern")


def _joined(left: _Pieces, right: _Pieces) -> _Pieces:
    """Joins the pieces of two nodes in sequence. What stands before a start, or after an end, must be empty."""
    found: list[tuple[Flags, list[str]]] = []
    for (starts, ends), before in left.full.items():
        for (starts_late, ends_late), after in right.full.items():
            if not ends and not starts_late:
                found.append(((starts, ends_late), [f"(?:{'|'.join(before)})(?:{'|'.join(after)})"]))
        found += [((starts, ends or end), before) for start, end in right.empty if not start]
    for (starts, ends), after in right.full.items():
        found += [((start or starts, ends), after) for start, end in left.empty if not end]
    empty = frozenset((a or c, b or d) for a, b in left.empty for c, d in right.empty)
    return _Pieces(empty, _collected(found))


def _collected(found: Iterable[tuple[Flags, list[str]]]) -> dict[Flags, list[str]]:
    full: dict[Flags, list[str]] = {}
    for flags, texts in found:
        known = full.setdefault(flags, [])
        known += [text for text in texts if text not in known]
    if sum(len(text) for texts in full.values() for text in texts) > _MAX_EXPRESSION_CHARS:
        raise PatternRefused("the pattern is too large once its classes and anchors are written out")
    return full


def _is_nullable(node: Node) -> bool:
    match node:
        case Sequence(parts):
            return all(_is_nullable(part) for part in parts)
        case Choice(alternatives):
            return any(_is_nullable(part) for part in alternatives)
        case Repeat(part, least, _):
            return least == 0 or _is_nullable(part)
        case _:
            return False


# --- Parsing ---

_GROUP_NAMES = {
    "(?<=": "a lookbehind, (?<=...)",
    "(?<!": "a negative lookbehind, (?<!...)",
    "(?P": "Python's named group, (?P...): write (?<name>...)",
}
_QUANTIFIER = re.compile(r"([*+?]|\{(\d{1,9})(,(\d{1,9})?)?\})(\?)?")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_LOW_SURROGATE = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})")
_PROPERTY = re.compile(r"[pP]\{(?:(?:gc|General_Category)=)?([^}]*)\}")
_NAMED_GROUP = re.compile(r"\(\?<[A-Za-z_$][\w$]*>")


class _Parser:
    """A recursive-descent parser. Groups that capture are like others, because backreferences are refused."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._choice()
        if self._at < len(self._pattern):
            raise PatternRefused("a group is closed that was not opened: )")
        return node

    def _choice(self) -> Node:
        alternatives = [self._sequence()]
        while self._takes("|"):
            alternatives.append(self._sequence())
        return alternatives[0] if len(alternatives) == 1 else Choice(tuple(alternatives))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _quantified(self, part: Node) -> Node:
        found = _QUANTIFIER.match(self._pattern, self._at)
        if found is None:
            return part
        self._at = found.end()
        symbol, least, comma, most, _ = found.groups()
        if isinstance(part, Anchor | Lookahead) or _QUANTIFIER.match(self._pattern, self._at):
            raise PatternRefused(f"the quantifier {symbol!r} has nothing to repeat")
        if symbol in _QUANTIFIERS:
            return Repeat(part, *_QUANTIFIERS[symbol])
        low, high = int(least), (int(most) if most else None) if comma else int(least)
        if low > (low if high is None else high):
            raise PatternRefused(f"the numbers of the quantifier {symbol!r} are out of order")
        if max(low, high or 0) > MAX_REPETITIONS:
            raise PatternRefused(f"the quantifier {symbol!r} is too large; at most {MAX_REPETITIONS} are allowed")
        return Repeat(part, low, high)

    def _atom(self) -> Node:
        match self._next():
            case "(":
                return self._group()
            case "[":
                return Chars(self._class())
            case "\\":
                return Chars(_without_surrogates(self._escape()))
            case "^":
                return Anchor(is_start=True)
            case "$":
                return Anchor(is_start=False)
            case ".":
                return Chars(_inverse(_LINE_ENDS))
            case "*" | "+" | "?" as symbol:
                raise PatternRefused(f"the quantifier {symbol!r} has nothing to repeat")
            case character:
                return Chars(_without_surrogates(_one(character)))

    def _group(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise PatternRefused(f"groups nest more than {_MAX_NESTING} levels deep")
        start = self._at - 1
        for prefix, name in _GROUP_NAMES.items():
            if self._pattern.startswith(prefix, start):
                raise PatternRefused(f"{name}, is not supported")
        look = next((sign for sign in ("?=", "?!") if self._takes(sign)), None)
        if named := _NAMED_GROUP.match(self._pattern, start):
            self._at = named.end()
        elif look is None and not self._takes("?:") and self._takes("?"):
            raise PatternRefused("flags in a group, such as (?i), are not supported")
        node = self._choice()
        if not self._takes(")"):
            raise PatternRefused("a group is not closed: (")
        self._depth -= 1
        return node if look is None else Lookahead(node, look == "?!")

    def _class(self) -> Ranges:
        inverse = self._takes("^")
        found: list[tuple[int, int]] = []
        while not self._takes("]"):
            low = self._class_member()
            if self._pattern[self._at : self._at + 1] == "-" and self._pattern[self._at + 1 : self._at + 2] not in (
                "]",
                "",
            ):
                self._at += 1
                low = _range(low, self._class_member())
            found += low if inverse else _without_surrogates(low)
        ranges = without(found, _SURROGATES)
        return _inverse(ranges) if inverse else ranges

    def _class_member(self) -> Ranges:
        character = self._next()
        if character != "\\":
            return _one(character)
        return _one("\b") if self._takes("b") else self._escape()

    def _escape(self) -> Ranges:
        if found := _HEX.match(self._pattern, self._at):
            self._at = found.end()
            return self._hex(int(next(digits for digits in found.groups() if digits), 16))
        if found := _PROPERTY.match(self._pattern, self._at):
            self._at = found.end()
            return self._property(found.group(1), inverse=found.group().startswith("P"))
        letter = self._next()
        if letter.lower() in _SHORTHANDS:
            ranges = _SHORTHANDS[letter.lower()]
            return ranges if letter.islower() else _inverse(ranges)
        if letter == "c" and (control := self._pattern[self._at : self._at + 1]).isalpha() and control.isascii():
            self._at += 1
            return _one(chr(ord(control) % 32))
        if letter in "bB":
            raise PatternRefused(f"a word boundary, \\{letter}, is not supported")
        if letter == "k" or letter in "123456789":
            raise PatternRefused(f"a backreference, \\{letter}, is not supported")
        if letter == "0" and self._pattern[self._at : self._at + 1] in _DIGIT_CHARACTERS:
            raise PatternRefused("an octal escape, such as \\01, is not supported: write \\x01")
        if letter in _CONTROLS:
            return _one(chr(_CONTROLS[letter]))
        if letter.isascii() and letter.isalnum():
            raise PatternRefused(f"the escape \\{letter} is not known")
        return _one(letter)

    def _hex(self, point: int) -> Ranges:
        low = _LOW_SURROGATE.match(self._pattern, self._at)
        if low and 0xD800 <= point < 0xDC00:
            self._at = low.end()
            point = 0x10000 + ((point - 0xD800) << 10) + int(low.group(1), 16) - 0xDC00
        if point > _MAX_CODE_POINT:
            raise PatternRefused(f"there is no character \\u{{{point:x}}}")
        return ((point, point),)

    def _property(self, name: str, *, inverse: bool) -> Ranges:
        category = _LONG_NAMES.get(name, name)
        if category not in _CATEGORIES:
            raise PatternRefused(f"the Unicode property {name[:40]!r} is not supported; use a general category")
        ranges = _category(category)
        return _inverse(ranges) if inverse else ranges

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            raise PatternRefused("the pattern ends within an escape or a class")
        self._at += 1
        return self._pattern[self._at - 1]

    def _takes(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True


_QUANTIFIERS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def _one(character: str) -> Ranges:
    return ((ord(character), ord(character)),)


_DIGIT_CHARACTERS = tuple("0123456789")


def _range(low: Ranges, high: Ranges) -> Ranges:
    """Returns the characters of a range in a class. Beside a set, such as in `[\\w-.]`, the hyphen is a character."""
    if _size(low) != 1 or _size(high) != 1:
        return _merged([*low, *_one("-"), *high])
    if low[0][0] > high[0][0]:
        raise PatternRefused("a range in [...] is out of order")
    return ((low[0][0], high[0][0]),)


def _without_surrogates(ranges: Ranges) -> Ranges:
    """Returns the characters. Raises PatternRefused if there are only surrogates, of which no text consists."""
    found = without(ranges, _SURROGATES)
    if ranges and not found:
        raise PatternRefused("a surrogate without its pair is not supported: write \\u{1F600} or the character")
    return found


def _size(ranges: Ranges) -> int:
    return sum(high - low + 1 for low, high in ranges)


# --- Matching ---


@lru_cache(maxsize=1024)
def _matcher(pattern: str, *, searches: bool) -> Any:
    conditions = parse(pattern, searches=searches, max_chars=MAX_FORMAT_CHARS).conditions(text_characters)
    terminal = " & ".join(f"{'' if must_match else '~'}/{text}/" for must_match, text in conditions)
    return lark.matcher(f"start: T\nT: {terminal}")


def matches(pattern: str, text: str, *, searches: bool) -> bool:
    """Whether the text matches the pattern, in linear time. Raises PatternRefused."""
    found = _matcher(pattern, searches=searches).deep_copy()
    if lark.accepts(found, text):
        return True
    if found.is_error() and "satisfy" not in found.get_error() and not found.get_error().startswith("NoExtension"):
        raise PatternRefused("the pattern is too complex")
    return False
