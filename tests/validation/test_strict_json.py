"""What is written is read back exactly, with integers of any size; what cannot be kept is refused with its place."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.validation import strict_json
from service.validation.strict_json import TooDeep, Unstorable

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INTEGERS = st.integers() | st.integers(-(10**60), 10**60)
SCALARS = st.none() | st.booleans() | INTEGERS | TEXT | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def same(one: Any, two: Any) -> bool:
    """Whether two values are equal and of the same types: 1, 1.0 and True are different JSON values."""
    return repr(one) == repr(two)


@given(VALUES)
def test_what_is_written_is_read_back(value: Any):
    for written in (strict_json.dump(value), strict_json.write(value)):
        assert same(strict_json.load(written), value)
        assert same(strict_json.load(written.decode()), value)
        assert same(strict_json.parse(written), value)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_sorted_keys_make_equal_documents_equal(document: dict[str, Any]):
    other = dict(reversed(document.items()))
    assert strict_json.dump(document, sort_keys=True) == strict_json.dump(other, sort_keys=True)


@pytest.mark.parametrize("leaf", [1, 10**30])
def test_a_value_may_be_as_deep_with_a_large_integer_as_without(leaf: int):
    deep: Any = leaf
    for _ in range(strict_json._MAX_LEVELS):
        deep = [deep]
    assert strict_json.load(strict_json.dump(deep)) == deep
    with pytest.raises(TooDeep):
        strict_json.dump([deep])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a":{"b":[1,"\\ud800"]}}', ("a", "b", 1)),
        ('{"a":[{"\\udfff":1}]}', ("a", 0, "\\udfff")),
        ('{"a":[%s]}' % ("9" * 5000), ("a", 0)),
        ("[-%s]" % ("9" * 5000), (0,)),
    ],
)
def test_what_cannot_be_kept_names_its_place(text: str, place: tuple[Any, ...]):
    with pytest.raises(Unstorable) as refusal:
        strict_json.dump(strict_json.parse(text))
    assert refusal.value.place == place


@pytest.mark.parametrize("value", [2**63, 2**64 - 1, 2**64, -(2**70)])
def test_large_integers_are_refused_where_64_bits_are_the_limit(value: int):
    if value.bit_length() <= 64:
        assert strict_json.dump(value, max_bits=64)
    else:
        with pytest.raises(Unstorable, match="64 bits"):
            strict_json.dump([value], max_bits=64)
