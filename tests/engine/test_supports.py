"""Supports: the run-length code, and its agreement with the loss mask for every kind of action and sampling."""

import random
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.agent.action_spaces import DiscreteSpace, RegexSpace, TextSpace
from service.engine import supports
from service.engine.base import ReasoningBudget, Recorded, Transcript, Wanted
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Decision, Sampling, Span
from tests.support.acts import slot

TURNS = DiscreteSpace(("left", "right", "up"))
"""Its actions have distinct first tokens: one branch."""
DOORS = DiscreteSpace(("open door 1", "open door 2", "open window", "wait"))
"""Several branches."""
ONLY = DiscreteSpace(("wait",))
TEXT = TextSpace()
GRAMMAR = RegexSpace.of({"type": "regex", "pattern": "[a-z]+"})
DRAWN, GREEDY = Sampling(temperature=1.5), Sampling(temperature=0.0)
TOP_1, TOP_2 = Sampling(top_k=1), Sampling(top_k=2, temperature=0.0)
THINKS = ReasoningBudget(8, keep=True)
ALL, FILTERED, RECORDED = supports.ALL, supports.FILTERED, supports.RECORDED


def expanded(code: "array[int]") -> list[tuple[int, list[int]]]:
    """Returns the kind and the ids of each token."""
    return [(kind, list(ids)) for num_tokens, kind, ids in supports.runs(code) for _ in range(num_tokens)]


async def decided(engine: ScriptedEngine, space: Any, sampling: Sampling, **wanted: Any) -> Span:
    asked = Wanted(sampling, lambda _: random.Random(3), slot, **wanted)
    decision = await engine.decide(Transcript("", engine.history(), "look", 4096, slides=True), space, asked)
    assert isinstance(decision, Decision)
    return decision.span


@pytest.mark.parametrize(
    ("space", "sampling", "thinks", "kinds"),
    [
        (TEXT, DRAWN, None, {ALL}),
        (TEXT, GREEDY, None, {ALL}),
        (TEXT, Sampling(max_tokens=2), None, {ALL}),
        (TEXT, TOP_1, None, {FILTERED}),
        (TEXT, Sampling(top_p=0.9), None, {FILTERED}),
        (TEXT, Sampling(min_p=0.1), None, {FILTERED}),
        (TEXT, TOP_2, None, {ALL}),
        (TEXT, TOP_1, THINKS, {FILTERED}),
        (TEXT, Sampling(temperature=0.001), None, {FILTERED}),
        (GRAMMAR, DRAWN, None, {FILTERED}),
        (GRAMMAR, DRAWN, THINKS, {ALL, FILTERED}),
        (TURNS, DRAWN, None, {3}),
        (TURNS, GREEDY, None, {3}),
        (TURNS, TOP_1, None, {1}),
        (TURNS, TOP_2, THINKS, {ALL, 2}),
        (TURNS, DRAWN, THINKS, {ALL, 3}),
        (DOORS, GREEDY, None, {2}),
        (DOORS, TOP_1, None, {FILTERED}),
        (DiscreteSpace(DOORS.actions, "taken"), TOP_1, None, {FILTERED}),
        (DiscreteSpace(DOORS.actions, "taken"), DRAWN, None, {2}),
        (ONLY, DRAWN, None, set()),
    ],
)
async def test_the_loss_mask_is_1_exactly_where_the_support_says_drawn(
    tokenizer: HFTokenizer, space: Any, sampling: Sampling, thinks: Any, kinds: set[int]
):
    reply = {True: "a thought", False: "open door 2"}
    engine = ScriptedEngine(tokenizer, reply=lambda prompt: reply[prompt.endswith("<think>\n")])
    engine.min_temperature = 0.01
    span = await decided(engine, space, sampling, reasoning=thinks)
    tokens = expanded(span.support)
    assert len(tokens) == len(span.token_ids)
    assert [kind not in (supports.NOT_DRAWN, RECORDED) for kind, _ in tokens] == [bool(one) for one in span.loss_mask]
    assert {kind for kind, _ in tokens} - {supports.NOT_DRAWN} == kinds
    for token, (kind, ids) in zip(span.token_ids, tokens, strict=True):
        assert len(ids) == max(kind, 0)
        assert not ids or token in ids


@pytest.mark.parametrize("space", [TEXT, TURNS, GRAMMAR])
async def test_a_recorded_action_is_recorded_with_its_terminator(tokenizer: HFTokenizer, space: Any):
    engine = ScriptedEngine(tokenizer)
    span = await decided(engine, space, DRAWN, recorded=Recorded("left", "left"), reasoning=THINKS)
    tokens = expanded(span.support)
    assert len(tokens) == len(span.token_ids)
    recorded = [token for token, (kind, _) in zip(span.token_ids, tokens, strict=True) if kind == RECORDED]
    assert recorded == [*engine.prompt.encode_reply("left"), engine.prompt.terminator]
    assert recorded == list(span.token_ids[-len(recorded) :])
    assert not any(span.loss_mask)


IDS = st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)


@given(st.dictionaries(st.integers(0, 20), IDS), st.integers(0, 4))
def test_the_code_of_a_choice_has_each_drawn_token_at_its_place(drawn: dict[int, Any], num_more: int):
    num_tokens = max(drawn, default=-1) + 1 + num_more
    tokens = expanded(supports.of_choice(num_tokens, sorted(drawn.items())))
    known = {place: (FILTERED, []) if ids is None else (len(ids), ids) for place, ids in drawn.items()}
    assert tokens == [known.get(place, (supports.NOT_DRAWN, [])) for place in range(num_tokens)]


def test_drawn_tokens_without_a_code_are_filtered():
    span = Span(array("i", [7, 8, 9]), b"\x00\x01\x01", array("f", [0.0, -1.0, -1.0]))
    assert expanded(supports.support_of(span)) == [(supports.NOT_DRAWN, []), (FILTERED, []), (FILTERED, [])]
