"""How an encoder-decoder engine renders a transcript, and what it stores."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from service.agent.action_spaces import DiscreteSpace, TextSpace
from service.engine.base import Constraint, EngineInfo, Overflow, Recorded, Transcript, Wanted
from service.engine.completion import Completion, Scores
from service.engine.decision_trie import Branch
from service.engine.encoder_decoder import EncoderDecoderEngine
from service.engine.encoder_prompt import EncoderPrompt, rendered
from service.engine.text_log import TextLog
from service.engine.tokenizer import HFTokenizer
from service.trajectory import Decision, Message, Sampling, Step
from tests.support.acts import slot
from tests.support.tiny_seq2seq import END, PAD, tokenizer

SOURCE_TEXT = "Observation: {observation}"


class Echo(EncoderDecoderEngine):
    """Writes "go left", and gives all children of a branch the same score."""

    def __init__(self) -> None:
        own = HFTokenizer(tokenizer())
        prompt = EncoderPrompt(own, (PAD,), (END,))
        super().__init__(EngineInfo("echo", "echo-1", 512, Sampling(max_tokens=20)), own, prompt, 30)

    async def generate(
        self, prompt_token_ids: list[int], sampling: Sampling, constraint: Constraint | None, **_: Any
    ) -> Completion:
        ids = (*self.prompt.encode_reply("go left"), END)
        return Completion(ids, (-0.5,) * len(ids), " go left", "stop", 0)

    async def score(self, encoder_token_ids: list[int], branches: Sequence[Branch], **_: Any) -> list[Scores]:
        return [Scores((-1.0,) * len(branch.children), 0) for branch in branches]

    async def check_constraint(self, constraint: Constraint) -> None: ...


@pytest.fixture(scope="module")
def engine() -> Any:
    return type("Usable", (Echo,), {"__abstractmethods__": frozenset()})()


def decide(engine: Any, history: TextLog, observation: str, space: Any = None, **changes: Any) -> Any:
    transcript = replace(Transcript("Find the key.", history, observation, 512, slides=True), **changes)
    wanted = Wanted(Sampling(max_tokens=20), lambda _: random.Random(1), slot)
    return asyncio.run(engine.decide(transcript, space or TextSpace(), wanted))


def seen(engine: Any, decision: Decision) -> str:
    """The text that the encoder received."""
    ids = list(decision.span.encoder_token_ids or ())
    assert ids[-1] == END
    return engine.tokenizer.decode(ids).strip()


def step(index: int, observation: str, decision: Decision) -> Step:
    answer = {"text": decision.text}
    return Step("e", index, Message(observation), False, decision.span, decision.window_start, answer, b"", 0.0)


def played(engine: Any, num_steps: int, **changes: Any) -> tuple[TextLog, list[Decision]]:
    history, decisions = engine.history(), []
    for index in range(num_steps):
        decision = decide(engine, history, f"door {index}", **changes)
        assert isinstance(decision, Decision)
        history.append(step(index, f"door {index}", decision))
        decisions.append(decision)
    return history, decisions


def test_the_encoder_reads_instructions_history_and_observation(engine: Any):
    _, decisions = played(engine, 3)
    spaced = seen(engine, decisions[2])
    assert spaced == (
        "Find the key. Observation: door 0 Action: go left Observation: door 1 Action: go left "
        "Observation: door 2 Action:"
    )
    assert decisions[2].window_start == 1


def test_a_template_without_history_makes_the_policy_stateless(engine: Any):
    _, decisions = played(engine, 3, template=SOURCE_TEXT)
    assert [seen(engine, one) for one in decisions] == [f"Observation: door {n}" for n in range(3)]


def test_braces_of_an_observation_are_not_placeholders():
    text = rendered("{instructions}|{history}|{observation}", "{observation}", [], "{history} {x} {}")
    assert text == "{observation}||{history} {x} {}"


def test_an_observation_cannot_end_the_input(engine: Any):
    decision = decide(engine, engine.history(), "look </s> <pad>", template=SOURCE_TEXT)
    ids = list(decision.span.encoder_token_ids)
    assert ids.count(END) == 1
    assert PAD not in ids


def test_a_full_window_keeps_step_0_and_drops_the_oldest_others(engine: Any):
    _, decisions = played(engine, 30, max_tokens=160)
    starts = [one.window_start for one in decisions]
    assert starts == sorted(starts)
    assert starts[0] == 1 < starts[-1]
    for index, one in enumerate(decisions):
        text = seen(engine, one)
        assert len(one.span.encoder_token_ids or ()) <= 160
        assert "door 0 " in text
        assert f"door {index} Action:" in text
        shown = [n for n in range(1, index) if f"door {n} " in text]
        assert shown == list(range(one.window_start, index))


def test_a_window_is_the_longest_that_fits(engine: Any):
    history, _ = played(engine, 20)
    decision = decide(engine, history, "door 20", max_tokens=200)
    longer = TextLog(history.window(1), decision.window_start - 1)
    assert isinstance(decide(engine, longer, "door 20", max_tokens=200, slides=False), Overflow)


def test_an_observation_that_does_not_fit_overflows(engine: Any):
    history, _ = played(engine, 2)
    assert isinstance(decide(engine, history, "door " * 200), Overflow)
    assert isinstance(decide(engine, history, "door " * 200, template=SOURCE_TEXT), Overflow)
    assert isinstance(decide(engine, history, "door", max_tokens=30, slides=False), Overflow)


def test_an_action_that_is_longer_than_a_reply_overflows(engine: Any):
    assert isinstance(decide(engine, engine.history(), "look", DiscreteSpace(("a" * 100, "b"))), Overflow)


def test_a_step_stores_both_streams(engine: Any):
    decision = decide(engine, engine.history(), "look", DiscreteSpace(("left", "right")))
    span = decision.span
    own = engine.tokenizer
    assert list(span.token_ids) == [PAD, *own.encode(f" {decision.action}"), END]
    assert list(span.loss_mask) == [0, 1, 0]
    assert decision.logprob == pytest.approx(span.logprobs[1])
    assert decision.usage.prompt_tokens == len(span.encoder_token_ids)


def test_a_recorded_action_is_stored_without_a_mask(engine: Any):
    wanted = Wanted(Sampling(), lambda _: random.Random(1), slot, recorded=Recorded("go left", "go left"))
    transcript = Transcript("", engine.history(), "look", 512, slides=True)
    decision = asyncio.run(engine.decide(transcript, TextSpace(), wanted))
    assert (decision.text, sum(decision.span.loss_mask)) == ("go left", 0)
    assert list(decision.span.token_ids) == [PAD, *engine.prompt.encode_reply("go left"), END]
    assert decision.span.encoder_token_ids


def test_a_copy_of_a_history_is_independent(engine: Any):
    history, decisions = played(engine, 2)
    twin = history.copy()
    twin.append(step(2, "door 2", decisions[1]))
    assert (history.num_steps, twin.num_steps) == (2, 3)
