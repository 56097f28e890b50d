"""Parses JSON from callers strictly, and writes and reads the JSON that the service stores. Integers stay exact.

orjson writes JSON fastest, but it knows only integers of at most 64 bits. Values with larger integers are written by
the standard library.
"""

import codecs
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NoReturn, cast

import orjson
from pydantic_core import from_json

Pairs = list[tuple[str, Any]]
Place = tuple[str | int, ...]

_HEADROOM = 16
"""Levels of nesting that are reserved for the answer around a value. orjson writes at most 254 levels in total."""
_MAX_LEVELS = 254 - _HEADROOM


class Unstorable(ValueError):
    """A JSON value that the service cannot keep. `place` is the path of keys and indexes to the part that is wrong."""

    def __init__(self, reason: str, place: Place = ()) -> None:
        super().__init__(reason)
        self.place = place


class TooDeep(Unstorable):
    """The value nests too deeply."""


class _LongInteger:
    """An integer that is too long to be converted. It is no dataclass, because orjson would write it."""

    __slots__ = ("num_digits",)

    def __init__(self, num_digits: int) -> None:
        self.num_digits = num_digits


def parse(text: str | bytes, *, object_pairs_hook: Callable[[Pairs], Any] | None = None) -> Any:
    """Parses a JSON document as `parse_unchecked` does. Raises Unstorable for an integer that has too many digits."""
    value, has_long_integer = _parsed(text, object_pairs_hook)
    if has_long_integer:
        check(value)
    return value


def parse_unchecked(text: str | bytes, *, object_pairs_hook: Callable[[Pairs], Any] | None = None) -> Any:
    """Parses a JSON document. Bytes are UTF-8, with or without a byte order mark. `object_pairs_hook` is that of
    json.loads. An integer that has too many digits becomes an object that `check` and `dump` refuse.

    Raises ValueError if the text is not JSON, has NaN or a number that overflows a float, or nests too deeply.
    """
    return _parsed(text, object_pairs_hook)[0]


def _parsed(text: str | bytes, object_pairs_hook: Callable[[Pairs], Any] | None) -> tuple[Any, bool]:
    """Returns the value, and whether it may contain an integer that has too many digits."""
    if isinstance(text, bytes):
        text = _decoded(text)
    try:
        return _decoder(object_pairs_hook).decode(text), False
    except RecursionError as error:
        raise ValueError("the JSON nests too deeply") from error
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        return _decoder(object_pairs_hook, _integer).decode(text), True


@cache
def _decoder(
    object_pairs_hook: Callable[[Pairs], Any] | None, parse_int: Callable[[str], Any] | None = None
) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=object_pairs_hook, parse_constant=_no_constant, parse_float=_finite, parse_int=parse_int
    )


def without_twins(pairs: Pairs) -> dict[str, Any]:
    """An `object_pairs_hook` that rejects duplicate keys. Raises ValueError."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twin[:100]!r} twice")
    return result


def dump(value: Any, *, sort_keys: bool = False, max_bits: int | None = None) -> bytes:
    """Serializes a value as compact JSON in UTF-8, the form in which the store keeps it.

    Raises Unstorable for a lone surrogate and for an integer of more than `max_bits` bits, and TooDeep for a value that
    nests so deeply that an answer could not contain it.
    """
    wrapped = value
    for _ in range(_HEADROOM):
        wrapped = [wrapped]
    try:
        written = orjson.dumps(wrapped, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError:
        check(value, max_bits)
        return _written(value, sort_keys=sort_keys)
    return written[_HEADROOM:-_HEADROOM]


def write(document: object, *, default: Callable[[Any], Any] | None = None) -> bytes:
    """Serializes a document as compact JSON in UTF-8. `default` is that of json.dumps.

    Raises TypeError or ValueError for a value that is not JSON.
    """
    try:
        return orjson.dumps(document, default)
    except TypeError:  # it may have a large integer
        return _written(document, default=default)


def load(text: str | bytes) -> Any:
    """Parses JSON that `dump` wrote. orjson would turn integers of more than 64 bits into floats."""
    try:
        return from_json(text)
    except ValueError:  # more than 200 levels
        return json.loads(text)


def check(value: Any, max_bits: int | None = None) -> None:
    """Raises Unstorable for a part of a parsed document that cannot be kept."""
    for place, part in _parts(value):
        if len(place) > _MAX_LEVELS:
            raise TooDeep(f"nests more than {_MAX_LEVELS} levels", place[:3])
        if isinstance(part, _LongInteger):
            raise Unstorable(f"an integer of {part.num_digits} digits. Send at most {_max_digits()} digits", place)
        if max_bits and isinstance(part, int) and part.bit_length() > max_bits:
            raise Unstorable(f"an integer of more than {max_bits} bits", place)
        if isinstance(part, str) and not _is_unicode(part):
            raise Unstorable("a lone surrogate, which is not valid Unicode", place)


def _parts(document: Any) -> Iterator[tuple[Place, Any]]:
    """Yields the path and the value of each scalar and key of a document, and the first path that is too deep."""
    pending: list[tuple[Place, Any]] = [((), document)]
    while pending:
        place, value = pending.pop()
        yield place, value
        if isinstance(value, dict):
            members = cast("dict[str, Any]", value)
            for key in members:
                yield (*place, key.encode(errors="backslashreplace").decode()[:100]), key
            pending += [((*place, key), item) for key, item in members.items()]
        elif isinstance(value, list):
            pending += [((*place, index), item) for index, item in enumerate(cast("list[Any]", value))]


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= one <= "\udfff" for one in text)


def _written(value: object, **options: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), **options).encode()


def _decoded(content: bytes) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error


def _integer(literal: str) -> int | _LongInteger:
    return int(literal) if len(literal.lstrip("-")) <= _max_digits() else _LongInteger(len(literal.lstrip("-")))


def _max_digits() -> int:
    return sys.get_int_max_str_digits()


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"the number {literal[:20]} does not fit into a 64-bit float")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
