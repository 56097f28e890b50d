"""Parses JSON from callers strictly: it rejects NaN, infinity, and values that the service could not store."""

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import orjson

Pairs = list[tuple[str, Any]]

_HEADROOM = 16
"""Levels of nesting that are reserved for the answer around a value. orjson writes at most 254 levels in total."""


def parse(text: str | bytes, *, object_pairs_hook: Callable[[Pairs], Any] | None = None) -> Any:
    """Parses a JSON document. `object_pairs_hook` is that of json.loads.

    Raises ValueError if the text is not JSON, has NaN or a number that overflows a float, or nests too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("the JSON nests too deeply") from error


def without_twins(pairs: Pairs) -> dict[str, Any]:
    """An `object_pairs_hook` that rejects duplicate keys. Raises ValueError."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return result


def dump(value: Any, *, sort_keys: bool = False) -> bytes:
    """Serializes a value as compact JSON in UTF-8, the form in which the store keeps it.

    Raises ValueError for lone surrogates, for integers of more than 64 bits, and for a value that nests so deeply that
    an answer could not contain it.
    """
    wrapped = value
    for _ in range(_HEADROOM):
        wrapped = [wrapped]
    try:
        written = orjson.dumps(wrapped, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return written[_HEADROOM:-_HEADROOM]


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"the number {literal[:20]} does not fit into a 64-bit float")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
