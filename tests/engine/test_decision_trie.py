"""Decision tries: the distribution, compared with brute force; filters; draws; and tries of the packaged tokenizer."""

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from service.engine import supports
from service.engine.base import ActionSpaceRefused
from service.engine.decision_plans import Plan, plan
from service.engine.decision_trie import Branch, Chosen, DecisionTrie, log_softmax, renormalised
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Sampling
from tests.conftest import POLICY
from tests.engine.test_prompt import TEXTS

END = 0
"""The terminator of these tries. Letters are encoded as their code points, so no letter has this id."""

ACTIONS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=2, max_size=20, unique=True)
LOGPROBS = st.one_of(st.floats(-30, 0), st.just(-math.inf))
DRAWN = Sampling(temperature=1.0)
GREEDY = Sampling(temperature=0.0)


def trie_of(actions: list[str]) -> DecisionTrie:
    return DecisionTrie(actions, lambda text: [ord(letter) for letter in text], END)


def drawn_scores(data: st.DataObject, trie: DecisionTrie) -> list[list[float]]:
    return [data.draw(st.lists(LOGPROBS, min_size=len(b.children), max_size=len(b.children))) for b in trie.branches]


def brute_force(trie: DecisionTrie, scores: list[list[float]], temperature: float) -> dict[str, float]:
    """Computes the probability of each action token by token, as the product of the renormalised probabilities."""
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
    # The probabilities of aa, ab and b are 0.3, 0.3 and 0.4. So "b" is the most likely action, although "a" is the most
    # likely first token.
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
        # The tolerance is five standard deviations of the binomial proportion.
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
    with pytest.raises(ActionSpaceRefused, match="cannot distinguish the actions 'A' and 'a'"):
        DecisionTrie(["a", "A", "b"], lambda text: [ord(letter.lower()) for letter in text], END)


def test_an_action_that_holds_the_terminator_as_text_cannot_shadow_another():
    with pytest.raises(ActionSpaceRefused, match="cannot distinguish"):
        DecisionTrie(["a", "a\0b"], lambda text: [ord(letter) for letter in text], END)


@given(st.lists(LOGPROBS, min_size=1, max_size=20))
def test_log_softmax_sums_to_one(values: list[float]):
    assert sum(map(math.exp, log_softmax(values))) == pytest.approx(1.0)


def test_a_temperature_too_small_for_floats_still_takes_the_likeliest():
    trie = trie_of(["a", "b"])
    scores = [[-0.5, -0.9] for _ in trie.branches]
    assert trie.distribution(scores, Sampling(temperature=1e-310)) == [1.0, 0.0]


# --- tries of the packaged tokenizer


@pytest.fixture(scope="module")
def engine(tokenizer: HFTokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


def test_a_trie_of_1024_actions_has_them_all(engine: ScriptedEngine):
    actions = tuple(f"go to room {number} and open door {number % 7}" for number in range(1024))
    trie = engine.trie(actions)
    assert sorted(trie.actions) == sorted(actions)
    assert {engine.tokenizer.decode(ids[:-1]) for ids in trie.sequences} == set(actions)
    assert {ids[-1] for ids in trie.sequences} == {engine.prompt.terminator}
    assert engine.trie(actions) is trie


@given(st.lists(TEXTS, min_size=2, max_size=20, unique=True))
def test_different_texts_are_different_actions(engine: ScriptedEngine, actions: list[str]):
    assert sorted(engine.trie(tuple(actions)).actions) == sorted(actions)


def test_an_action_cannot_hold_the_terminator(engine: ScriptedEngine):
    trie = engine.trie(("go", "go<|end|>", "go<|end|>now"))
    assert all(ids.count(engine.prompt.terminator) == 1 for ids in trie.sequences)


def test_a_lossy_tokenizer_cannot_tell_some_actions_apart():
    class Uncased(HFTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.lower())

    with pytest.raises(ActionSpaceRefused, match="cannot distinguish"):
        ScriptedEngine(Uncased(AutoTokenizer.from_pretrained(POLICY))).trie(("Go", "go"))


# --- plans


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 0, 1, 3, 30]),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
)


def followed(plan: Plan, score: Callable[[Branch], list[float]]) -> tuple[Chosen, list[int]]:
    """Answers a plan. Returns the choice, and the number of requests in each round."""
    rounds: list[int] = []
    try:
        branches = next(plan)
        while True:
            rounds.append(len(branches))
            branches = plan.send(list(map(score, branches)))
    except StopIteration as end:
        return end.value, rounds


@given(ACTIONS, st.data(), SAMPLINGS, st.integers())
def test_a_plan_with_few_requests_makes_the_same_choice(
    actions: list[str], data: st.DataObject, sampling: Sampling, seed: int
):
    trie = trie_of(actions)
    scores = dict(zip(trie.branches, drawn_scores(data, trie), strict=True))
    whole, all_rounds = followed(plan(trie, sampling, random.Random(seed), all_probs=True), scores.__getitem__)
    taken, rounds = followed(plan(trie, sampling, random.Random(seed), all_probs=False), scores.__getitem__)
    assert sum(rounds) <= sum(all_rounds) == len(trie.branches)
    assert set(taken.probs) <= set(whole.probs)
    assert taken.probs == pytest.approx({action: whole.probs[action] for action in taken.probs}, abs=1e-9)
    assert taken.action == whole.action
    assert (taken.token_ids, taken.drawn) == (whole.token_ids, whole.drawn)
    assert taken.logprobs == pytest.approx(whole.logprobs, abs=1e-6)
    assert taken.logprob == pytest.approx(whole.logprob, abs=1e-6)
    assert taken.support == whole.support


@given(ACTIONS, st.data(), SAMPLINGS, st.integers(), st.booleans())
def test_renormalising_over_the_supports_gives_the_logprobs(
    actions: list[str], data: st.DataObject, sampling: Sampling, seed: int, all_probs: bool
):
    trie = trie_of(actions)
    scores = dict(zip(trie.branches, drawn_scores(data, trie), strict=True))
    chosen, _ = followed(plan(trie, sampling, random.Random(seed), all_probs=all_probs), scores.__getitem__)
    by_place = {len(branch.path): branch for branch, _ in trie.way(trie.actions.index(chosen.action))}
    place = 0
    for num_tokens, kind, ids in supports.runs(chosen.support):
        assert bool(kind) == (place in by_place)
        if kind > 0:
            branch = by_place[place]
            of_token = dict(zip(branch.children, scores[branch], strict=True))
            again = renormalised([of_token[token] for token in ids], sampling.temperature)
            assert again[ids.index(chosen.token_ids[place])] == pytest.approx(chosen.logprobs[place], abs=1e-6)
        elif kind:
            is_cut = trie.is_filtered(sampling) and len(trie.branches) > 1
            assert is_cut or max(scores[by_place[place]]) == -math.inf
        place += num_tokens
    assert place == len(chosen.token_ids)


@pytest.mark.parametrize("all_probs", [True, False])
@pytest.mark.parametrize("sampling", [DRAWN, GREEDY])
def test_a_uniform_draw_among_actions_that_the_model_rules_out_has_no_support(sampling: Sampling, all_probs: bool):
    trie = trie_of(["aa", "ab", "b"])
    scores = {(): [0.0, -math.inf], (97,): [-math.inf, -math.inf]}
    choosing = plan(trie, sampling, random.Random(0), all_probs=all_probs)
    chosen, _ = followed(choosing, lambda branch: scores[branch.path])
    assert [kind for _, kind, _ in supports.runs(chosen.support)] == [2, supports.FILTERED, supports.NOT_DRAWN]


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(top_p=0.8), Sampling(top_k=3), Sampling(min_p=0.3)])
def test_choices_of_few_requests_follow_the_distribution(sampling: Sampling):
    trie = trie_of(["aa", "ab", "b", "ba", "bb", "c"])
    generator = random.Random(5)
    scores = {branch: [generator.uniform(-2, 0) for _ in branch.children] for branch in trie.branches}
    draws = [
        followed(plan(trie, sampling, generator, all_probs=False), scores.__getitem__)[0].action for _ in range(20_000)
    ]
    probs = trie.distribution(list(scores.values()), sampling)
    for action, prob in zip(trie.actions, probs, strict=True):
        assert draws.count(action) / 20_000 == pytest.approx(prob, abs=5 * math.sqrt(prob * (1 - prob) / 20_000))


def test_a_flat_distribution_takes_few_rounds():
    trie = trie_of([f"{number:010b}" for number in range(1024)])
    choosing = plan(trie, GREEDY, random.Random(0), all_probs=False)
    _, rounds = followed(choosing, lambda branch: [0.0] * len(branch.children))
    assert sum(rounds) == len(trie.branches)
    assert len(rounds) <= 20
