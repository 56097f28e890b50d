"""Request bodies: any bytes are a document or malformed_json, and equal documents have equal digests."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.http import body
from service.errors import BadRequest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXT
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SCALARS | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RAW = st.binary(max_size=80) | st.text('{}[]",:0123456789.eE-+ntfalsruN\\u', max_size=60).map(str.encode)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_equal_documents_have_equal_digests_however_they_are_written(document: dict[str, Any]):
    plain = body._parse(json.dumps(document).encode())
    spaced = body._parse(json.dumps(dict(reversed(document.items())), indent=2, ensure_ascii=False).encode())
    assert plain == spaced == document
    assert body.digest(plain) == body.digest(spaced)


@given(st.dictionaries(TEXT, VALUES, max_size=3), st.dictionaries(TEXT, VALUES, max_size=3))
def test_other_documents_have_other_digests(one: dict[str, Any], two: dict[str, Any]):
    same = json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)
    assert (body.digest(one) == body.digest(two)) == same


def test_the_digest_leaves_out_how_a_call_is_sent():
    content = {"observation": "x", "reward": 1.0}
    delivery = {"episode_id": "e", "step": 3, "timeout_s": 2.0}
    assert body.digest(content) == body.digest({**content, **delivery})
    assert body.digest(content) != body.digest({**content, "info": {"step": 3}})


@settings(max_examples=300)
@given(RAW)
def test_no_bytes_make_the_reader_fail_otherwise(raw: bytes):
    try:
        document = body._parse(raw)
    except BadRequest:
        return
    assert document == json.loads(raw)
