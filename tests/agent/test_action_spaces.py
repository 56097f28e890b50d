"""Action spaces: the decision trie against brute force, what each space refuses, and how it parses."""

import json
import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.agent.action_spaces import (
    MAX_PATTERN_CHARS,
    ActionSpaceError,
    DecisionTrie,
    TextSpace,
    discrete_space,
    json_space,
    log_softmax,
    regex_space,
    tools_space,
)
from service.trajectory import Sampling
from service.validation.json_schema import MAX_NESTING, MAX_SCHEMA_BYTES

END = 0
"""The terminator of these tries; letters encode as their code points, so it is no letter."""

ACTIONS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=2, max_size=20, unique=True)
LOGPROBS = st.one_of(st.floats(-30, 0), st.just(-math.inf))
DRAWN = Sampling(temperature=1.0)
GREEDY = Sampling(temperature=0.0)


def trie_of(actions: list[str]) -> DecisionTrie:
    return DecisionTrie(actions, lambda text: [ord(letter) for letter in text], END)


def drawn_scores(data: st.DataObject, trie: DecisionTrie) -> list[list[float]]:
    return [data.draw(st.lists(LOGPROBS, min_size=len(b.children), max_size=len(b.children))) for b in trie.branches]


def brute_force(trie: DecisionTrie, scores: list[list[float]], temperature: float) -> dict[str, float]:
    """Walks each action token by token and multiplies the renormalised choices on the way."""
    by_path = {branch.path: (branch.children, row) for branch, row in zip(trie.branches, scores, strict=True)}
    probs = {}
    for action in trie.actions:
        ids, prob = [*map(ord, action), END], 1.0
        for depth, token in enumerate(ids):
            if tuple(ids[:depth]) not in by_path:
                continue
            children, logprobs = by_path[tuple(ids[:depth])]
            weights = [math.exp(value / temperature) for value in logprobs]
            share = weights[children.index(token)] / sum(weights) if sum(weights) else 1 / len(children)
            prob *= share
        probs[action] = prob
    return probs


@given(ACTIONS, st.data(), st.sampled_from([0.3, 1.0, 2.5]))
def test_the_distribution_is_the_product_of_the_choices_on_the_way(
    actions: list[str], data: st.DataObject, temperature: float
):
    trie = trie_of(actions)
    scores = [
        data.draw(st.lists(st.floats(-30, 0), min_size=len(b.children), max_size=len(b.children)))
        for b in trie.branches
    ]
    found = dict(zip(trie.actions, trie.distribution(scores, Sampling(temperature=temperature)), strict=True))
    expected = brute_force(trie, scores, temperature)
    assert found == pytest.approx(expected, abs=1e-9)


@given(ACTIONS, st.data(), st.floats(0, 3), st.floats(0.01, 1), st.integers(0, 5), st.floats(0, 1), st.integers())
def test_a_draw_is_legal_and_its_logprob_is_that_of_the_distribution(
    actions: list[str], data: st.DataObject, temperature: float, top_p: float, top_k: int, min_p: float, seed: int
):
    trie = trie_of(actions)
    scores = drawn_scores(data, trie)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    chosen = trie.draw(scores, sampling, random.Random(seed))
    assert chosen.action in actions
    assert set(chosen.probs) == set(actions)
    assert sum(chosen.probs.values()) == pytest.approx(1.0, abs=1e-9)
    assert min(chosen.probs.values()) >= 0
    assert chosen.logprob == pytest.approx(math.log(chosen.probs[chosen.action]), abs=1e-9)
    assert list(chosen.token_ids) == [*map(ord, chosen.action), END]


@given(ACTIONS, st.data(), st.integers())
def test_the_drawn_tokens_are_those_at_branches_and_their_logprobs_make_the_action(
    actions: list[str], data: st.DataObject, seed: int
):
    trie = trie_of(actions)
    chosen = trie.draw(drawn_scores(data, trie), DRAWN, random.Random(seed))
    depths = {len(b.path) for b in trie.branches if chosen.token_ids[: len(b.path)] == b.path}
    assert {depth for depth, drawn in enumerate(chosen.drawn) if drawn} == depths
    assert all(logprob == 0.0 for drawn, logprob in zip(chosen.drawn, chosen.logprobs, strict=True) if not drawn)
    assert sum(chosen.logprobs) == pytest.approx(chosen.logprob, abs=1e-6)


@given(ACTIONS, st.data())
def test_temperature_0_takes_the_likeliest_action(actions: list[str], data: st.DataObject):
    trie = trie_of(actions)
    chosen = trie.draw(drawn_scores(data, trie), GREEDY, random.Random(0))
    assert chosen.probs[chosen.action] == max(chosen.probs.values())


@given(ACTIONS, st.data(), st.integers())
def test_the_same_seed_draws_the_same_action(actions: list[str], data: st.DataObject, seed: int):
    trie = trie_of(actions)
    scores = drawn_scores(data, trie)
    assert trie.draw(scores, DRAWN, random.Random(seed)) == trie.draw(scores, DRAWN, random.Random(seed))


@given(ACTIONS, st.data(), st.integers(1, 25))
def test_top_k_leaves_the_k_likeliest_actions(actions: list[str], data: st.DataObject, top_k: int):
    trie = trie_of(actions)
    scores = drawn_scores(data, trie)
    whole = trie.distribution(scores, DRAWN)
    kept = trie.distribution(scores, Sampling(top_k=top_k))
    positive = sum(prob > 0 for prob in kept)
    assert positive <= top_k
    assert min(p for p, k in zip(whole, kept, strict=True) if k > 0) >= max(
        (p for p, k in zip(whole, kept, strict=True) if k == 0), default=0
    )


def test_top_p_and_min_p_filter_actions_not_tokens():
    trie = trie_of(["aa", "ab", "b"])
    scores = [
        {(): [math.log(0.6), math.log(0.4)], (97,): [math.log(0.5), math.log(0.5)]}[b.path] for b in trie.branches
    ]
    # aa 0.3, ab 0.3, b 0.4: as an action "b" is the likeliest, though "a" is the likelier token.
    assert dict(zip(trie.actions, trie.distribution(scores, Sampling(top_p=0.35)), strict=True))["b"] == 1.0
    assert dict(zip(trie.actions, trie.distribution(scores, Sampling(top_k=1)), strict=True))["b"] == 1.0
    assert dict(zip(trie.actions, trie.distribution(scores, Sampling(min_p=0.8)), strict=True))["b"] == 1.0
    assert trie.draw(scores, GREEDY, random.Random(0)).action == "b"


def test_draws_follow_the_distribution():
    trie = trie_of(["a", "ab", "c"])
    scores = [[math.log(0.8), math.log(0.2)] for _ in trie.branches]
    generator = random.Random(5)
    counts = Counter(trie.draw(scores, DRAWN, generator).action for _ in range(20_000))
    expected = brute_force(trie, scores, 1.0)
    for action, prob in expected.items():
        # five standard deviations of a binomial share
        assert counts[action] / 20_000 == pytest.approx(prob, abs=5 * math.sqrt(prob * (1 - prob) / 20_000))


def test_actions_that_are_prefixes_of_each_other_are_told_apart():
    trie = trie_of(["a", "ab", "abc"])
    assert [branch.children for branch in trie.branches] == [(END, ord("b")), (END, ord("c"))]
    assert [branch.path for branch in trie.branches] == [(97,), (97, 98)]


def test_an_action_the_model_rules_out_is_never_drawn_and_a_branch_without_any_is_uniform():
    trie = trie_of(["a", "b"])
    assert trie.distribution([[-math.inf, -2.0]], DRAWN) == [0.0, 1.0]
    assert trie.distribution([[-math.inf, -math.inf]], DRAWN) == [0.5, 0.5]
    assert all(trie.draw([[-math.inf, -2.0]], DRAWN, random.Random(seed)).action == "b" for seed in range(50))


def test_one_legal_action_needs_no_choice():
    trie = trie_of(["go"])
    chosen = trie.draw([], DRAWN, random.Random(0))
    assert trie.branches == ()
    assert (chosen.action, chosen.probs, chosen.logprob) == ("go", {"go": 1.0}, 0.0)
    assert not any(chosen.drawn)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32))
def test_1024_actions_share_one_distribution(seed: int):
    trie = trie_of([f"move {number:04d}" for number in range(1024)])
    generator = random.Random(seed)
    scores = [[generator.uniform(-20, 0) for _ in branch.children] for branch in trie.branches]
    chosen = trie.draw(scores, DRAWN, generator)
    assert sum(chosen.probs.values()) == pytest.approx(1.0, abs=1e-9)
    assert len(chosen.probs) == 1024
    assert chosen.action in chosen.probs


def test_actions_that_tokenize_alike_are_refused():
    with pytest.raises(ActionSpaceError, match="cannot tell 'A' and 'a' apart"):
        DecisionTrie(["a", "A", "b"], lambda text: [ord(letter.lower()) for letter in text], END)


def test_an_action_that_holds_the_terminator_as_text_cannot_shadow_another():
    with pytest.raises(ActionSpaceError, match="apart"):
        DecisionTrie(["a", "a\0b"], lambda text: [ord(letter) for letter in text], END)


@given(st.lists(LOGPROBS, min_size=1, max_size=20))
def test_log_softmax_sums_to_one(values: list[float]):
    assert sum(map(math.exp, log_softmax(values))) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("actions", "why"),
    [
        (("one",), "1 actions"),
        ((), "0 actions"),
        (tuple(map(str, range(1025))), "1025 actions"),
        (("a", "a"), "distinct"),
        (("a", ""), "empty"),
    ],
)
def test_a_discrete_space_refuses(actions: tuple[str, ...], why: str):
    with pytest.raises(ActionSpaceError, match=why):
        discrete_space(actions)


def test_equal_discrete_spaces_are_one():
    assert discrete_space(("x", "y")) is discrete_space(("x", "y"))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"description": "x" * MAX_SCHEMA_BYTES}, "bytes long"),
        (nested(MAX_NESTING), "deep"),
        ({"type": "no such type"}, "not a JSON schema"),
        ({"properties": []}, "not a JSON schema"),
        ({"$ref": "https://example.com/schema.json"}, "another document"),
        ({"properties": {"a": {"items": [{"$ref": "file:///etc/passwd"}]}}}, "another document"),
        ({"$dynamicRef": "other.json#x"}, "another document"),
    ],
)
def test_a_json_space_refuses(schema: dict[str, Any], why: str):
    with pytest.raises(ActionSpaceError, match=why):
        json_space(schema)


def test_a_json_space_takes_what_is_just_within_its_bounds():
    json_space(nested(MAX_NESTING - 2))
    json_space({"$defs": {"a": {"type": "string"}}, "$ref": "#/$defs/a"})


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def test_a_json_action_is_the_parsed_value():
    assert json_space(POINT).parse('{"x": 3}', "stop") == ({"x": 3}, None)


@pytest.mark.parametrize(
    ("text", "finish_reason", "kind"),
    [('{"x": "three"}', "stop", "schema"), ('{"x":', "stop", "json"), ('{"x": 3}', "length", "length")],
)
def test_a_json_text_that_is_no_action_says_why(text: str, finish_reason: str, kind: str):
    action, failure = json_space(POINT).parse(text, finish_reason)
    assert action is None
    assert failure is not None
    assert failure.kind == kind
    assert failure.detail


def test_a_hostile_pattern_in_a_schema_is_not_run_by_the_backtracking_matcher():
    hostile = "a" * 5000 + "!"
    for schema, value in (
        ({"type": "string", "pattern": "^(a+)+$"}, hostile),
        ({"patternProperties": {"^(a+)+$": {"type": "integer"}}}, {hostile: 1}),
        ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, {hostile: 1}),
        ({"patternProperties": {"^(a+)+$": {}}, "unevaluatedProperties": False}, {hostile: 1}),
        ({"propertyNames": {"pattern": "^(a+)+$"}}, {hostile: 1}),
    ):
        assert json_space(schema).parse(json.dumps(value), "stop") == (value, None)


def test_additional_properties_are_still_checked_where_no_pattern_says_which_they_are():
    action, failure = json_space(POINT).parse('{"x": 1, "y": 2}', "stop")
    assert action is None
    assert failure is not None
    assert failure.kind == "schema"


def test_a_schema_that_refers_to_itself_forever_is_a_parse_failure():
    action, failure = json_space({"$ref": "#"}).parse("1", "stop")
    assert action is None
    assert failure is not None


def test_a_regex_space():
    assert regex_space("[ab]+").parse("ab", "stop") == ("ab", None)
    action, failure = regex_space("[ab]+c").parse("ab", "length")
    assert action is None
    assert failure is not None
    assert failure.kind == "length"
    with pytest.raises(ActionSpaceError, match="characters long"):
        regex_space("a" * (MAX_PATTERN_CHARS + 1))


def test_any_text_is_a_text_action():
    assert TextSpace().parse("", "length") == ("", None)


@pytest.mark.parametrize("text", ["1" * 30, '"\\ud800"', "[" * 250 + "]" * 250, "1e999", "-1e999", "NaN", "[" * 5000])
def test_a_value_that_could_not_be_kept_is_no_action(text: str):
    action, failure = json_space({}).parse(text, "stop")
    assert action is None
    assert failure is not None
    assert failure.kind == "json"


def test_a_temperature_too_small_for_floats_still_takes_the_likeliest():
    trie = trie_of(["a", "b"])
    scores = [[-0.5, -0.9] for _ in trie.branches]
    assert trie.distribution(scores, Sampling(temperature=1e-310)) == [1.0, 0.0]


def test_tools_are_bounded_together():
    tool = {"parameters": {"type": "object", "properties": {"x": {"enum": ["y" * 30_000]}}}}
    with pytest.raises(ActionSpaceError, match="too large"):
        tools_space([{"name": f"t{number}", **tool} for number in range(3)])


def test_a_tool_that_takes_anything_is_refused():
    with pytest.raises(ActionSpaceError, match="type object"):
        tools_space([{"name": "f", "parameters": {"$ref": "#/$defs/a", "$defs": {"a": True}}}])
