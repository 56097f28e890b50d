"""Writes regular expressions for the JSON numbers within a range. The number of digits is bounded.

Every integer of 64 bits and every 64-bit float within the range has a text that matches, and each text that matches is
a number within the range, as a float reads it.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
"""The integers that are written where the schema has no bound."""
_LARGEST = 10**100
"""The largest integer that is written."""
_DIGITS = 17
"""The number of significant digits that tell all 64-bit floats apart."""
_PLAIN = range(-6, 16)
"""The exponents of numbers that can be written without an exponent."""
_MIN_EXPONENT, _MAX_EXPONENT = -324, 308


def integers(low: int, high: int) -> str:
    """Returns an expression for the integers from `low` to `high`, without leading zeros."""
    found = [f"-(?:{_naturals(max(-high, 1), -low)})"] if low < 0 else []
    if high >= 0:
        found.append(_naturals(max(low, 0), high))
    return "|".join(found)


def floats(low: float, high: float) -> str:
    """Returns an expression for the numbers from `low` to `high`, in plain or scientific notation."""
    found = ["-?0(?:\\.0)?"] if low <= 0 <= high else []
    if high > 0:
        found.append(_positive(max(low, 5e-324), high))
    if low < 0:
        found.append(f"-(?:{_positive(max(-high, 5e-324), -low)})")
    return "|".join(found)


def _naturals(low: int, high: int) -> str:
    found: list[str] = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        found += _between(str(first), str(last))
    return "|".join(found)


def _between(low: str, high: str) -> Iterator[str]:
    """Yields expressions for the strings of digits from `low` to `high`, all of the same length."""
    if not low:
        yield ""
    elif low[0] == high[0]:
        yield from (low[0] + rest for rest in _between(low[1:], high[1:]))
    else:
        rest = len(low) - 1
        first, last = int(low[0]), int(high[0])
        if low[1:].strip("0"):
            yield from (low[0] + tail for tail in _between(low[1:], "9" * rest))
            first += 1
        if high[1:].strip("9"):
            yield from (high[0] + tail for tail in _between("0" * rest, high[1:]))
            last -= 1
        if first <= last:
            yield f"[{first}-{last}]" + (f"[0-9]{{{rest}}}" if rest else "")


def _positive(low: float, high: float) -> str:
    """Returns an expression for the numbers from `low` to `high`, both positive."""
    (low_digits, low_exponent), (high_digits, high_exponent) = _scientific(low), _scientific(high)
    smallest, largest = "1" + "0" * (_DIGITS - 1), "9" * _DIGITS
    groups: dict[tuple[str, str], list[int]] = {}
    for exponent in range(low_exponent, high_exponent + 1):
        first = low_digits if exponent == low_exponent else smallest
        last = high_digits if exponent == high_exponent else largest
        groups.setdefault((first, last), []).append(exponent)
    return "|".join(text for (first, last), exponents in groups.items() for text in _notations(first, last, exponents))


def _notations(first: str, last: str, exponents: list[int]) -> Iterator[str]:
    """Yields expressions for the numbers with these exponents and with significant digits from `first` to `last`."""
    for exponent in exponents:
        if exponent in _PLAIN:
            yield _plain(first, last, exponent)
    signed = [_exponents([value for value in exponents if value >= 0], r"\+?")]
    signed.append(_exponents([-value for value in exponents if value < 0], "-"))
    yield f"(?:{_mantissas(first, last, 1)})[eE](?:{'|'.join(filter(None, signed))})"


def _exponents(values: list[int], sign: str) -> str:
    return f"{sign}0?(?:{_naturals(min(values), max(values))})" if values else ""


def _plain(first: str, last: str, exponent: int) -> str:
    if exponent >= 0:
        return f"(?:{_mantissas(first, last, exponent + 1)})"
    return f"0\\.{'0' * (-exponent - 1)}(?:{_prefixes(first, last)})"


def _mantissas(first: str, last: str, num_whole: int) -> str:
    """Returns an expression for digits from `first` to `last` with a point after the first `num_whole` of them."""
    whole_first, whole_last = first[:num_whole], last[:num_whole]
    fraction_first, fraction_last = first[num_whole:], last[num_whole:]
    any_fraction = f"(?:\\.[0-9]{{1,{_DIGITS - num_whole}}})?"
    if not fraction_first.strip("0") and not fraction_last.strip("9"):
        return f"(?:{_naturals(int(whole_first), int(whole_last))}){any_fraction}"
    if whole_first == whole_last:
        return _with_fraction(whole_first, fraction_first, fraction_last)
    found = [_with_fraction(whole_first, fraction_first, "9" * len(fraction_first))]
    inner_first, inner_last = int(whole_first) + 1, int(whole_last) - 1
    if inner_first <= inner_last:
        found.append(f"(?:{_naturals(inner_first, inner_last)}){any_fraction}")
    found.append(_with_fraction(whole_last, "0" * len(fraction_last), fraction_last))
    return "|".join(found)


def _with_fraction(whole: str, first: str, last: str) -> str:
    fraction = f"\\.(?:{_prefixes(first, last)})"
    return f"{whole}(?:{fraction})?" if not first.strip("0") else f"{whole}{fraction}"


def _prefixes(first: str, last: str) -> str:
    """Returns an expression for strings of up to as many digits that are, as fractions, from `first` to `last`."""
    if not first:
        return ""
    if not last.strip("0"):
        return f"0{{1,{len(first)}}}"
    if not first.strip("0") and not last.strip("9"):
        return f"[0-9]{{1,{len(first)}}}"
    low, high = int(first[0]), int(last[0])
    found: list[str] = []
    if low == high:
        rest = _prefixes(first[1:], last[1:])
        is_short = not first[1:].strip("0")
        return f"{low}(?:{rest})" + ("?" if is_short and rest else "") if rest or is_short else f"{low}"
    inner_low, inner_high = low, high
    if first[1:].strip("0"):
        found.append(f"{low}(?:{_prefixes(first[1:], '9' * (len(first) - 1))})")
        inner_low += 1
    if last[1:].strip("9"):
        rest = _prefixes("0" * (len(last) - 1), last[1:])
        found.append(f"{high}(?:{rest})?")
        inner_high -= 1
    if inner_low <= inner_high:
        found.append(f"[{inner_low}-{inner_high}]" + (f"[0-9]{{0,{len(first) - 1}}}" if len(first) > 1 else ""))
    return "|".join(found)


def _scientific(value: float) -> tuple[str, int]:
    """Returns the significant digits of the shortest text of a float, and the exponent of the first digit."""
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)
    text = "".join(map(str, digits)).rstrip("0") or "0"
    return text.ljust(_DIGITS, "0"), len(digits) - 1 + exponent


Bound = tuple[float, bool]
"""A lower or an upper bound of numbers, and whether it is excluded."""


def integer_range(lower: Sequence[Bound], upper: Sequence[Bound]) -> tuple[int, int]:
    """Returns the smallest and the largest integer within all bounds. Where there is no bound, it has 64 bits, unless
    the other bound is beyond."""
    lows = [math.floor(bound) + 1 if is_open else math.ceil(bound) for bound, is_open in lower]
    highs = [math.ceil(bound) - 1 if is_open else math.floor(bound) for bound, is_open in upper]
    low, high = max(lows, default=MIN_INTEGER), min(highs, default=MAX_INTEGER)
    if low > high and not (lower and upper):
        low, high = max(lows, default=-_LARGEST), min(highs, default=_LARGEST)
    return max(low, -_LARGEST), min(high, _LARGEST)


def lower_floats(bounds: Iterable[Bound]) -> list[float]:
    """Returns the smallest floats within each of the bounds."""
    return [-sys.float_info.max, *(_float_from(bound, is_open, math.inf) for bound, is_open in bounds)]


def upper_floats(bounds: Iterable[Bound]) -> list[float]:
    """Returns the largest floats within each of the bounds."""
    return [sys.float_info.max, *(_float_from(bound, is_open, -math.inf) for bound, is_open in bounds)]


def _float_from(bound: float, is_open: bool, end: float) -> float:
    """Returns the first float in the direction of `end` that is within a bound, which may be an integer of any size."""
    try:
        nearest = float(bound)
    except OverflowError:
        nearest = math.inf if bound > 0 else -math.inf
    written, exact = Decimal(repr(nearest)), Decimal(repr(bound))  # the decimal numbers, as others may read them
    is_outside = written < exact if end > 0 else written > exact
    return math.nextafter(nearest, end) if is_outside or (is_open and nearest == bound) else nearest
