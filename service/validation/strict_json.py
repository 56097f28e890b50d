"""Owns the reading of JSON that comes from outside: no NaN, no infinity, and nothing that could not be kept."""

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import orjson

Pairs = list[tuple[str, Any]]

_HEADROOM = 16
"""Levels that an answer may put around a value, of the 254 that orjson writes."""


def parse(text: str | bytes, *, object_pairs_hook: Callable[[Pairs], Any] | None = None) -> Any:
    """The value. Raises ValueError for what is not JSON or nests too deeply to be read."""
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("the JSON nests too deeply") from error


def without_twins(pairs: Pairs) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses an object with a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def dump(value: Any, *, sort_keys: bool = False) -> bytes:
    """Compact JSON, as the store keeps it. Raises ValueError for lone surrogates, integers over 64 bits, and what nests
    so deeply that an answer could not hold it."""
    held = value
    for _ in range(_HEADROOM):
        held = [held]
    try:
        written = orjson.dumps(held, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return written[_HEADROOM:-_HEADROOM]


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"{literal[:20]} is too large a number")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
