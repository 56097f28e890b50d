"""The scripted engine behaves as the Engine protocol specifies. Many other tests rely on this."""

import asyncio
import math

import pytest

from service.engine.base import Constraint, ConstraintRefused, EngineUnavailable
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Sampling

PROMPT = [3, 20, 30, 1, 4]


async def test_a_completion_ends_with_the_end_of_turn(tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer, reply=lambda text: f"you said {len(text)}")
    completion = await engine.generate(PROMPT, Sampling(), None)
    assert completion.text == f"you said {len(tokenizer.decode(PROMPT))}"
    assert list(completion.token_ids) == [*tokenizer.encode(completion.text), tokenizer.eos_token_id]
    assert (completion.finish_reason, len(completion.logprobs)) == ("stop", len(completion.token_ids))


async def test_a_completion_is_cut_at_max_tokens(tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer, reply=lambda _: "many words and more words")
    completion = await engine.generate(PROMPT, Sampling(max_tokens=3), None)
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 3)
    assert completion.text == tokenizer.decode(completion.token_ids)


async def test_scores_are_a_distribution_and_the_same_each_time(tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer)
    first, again = [await engine.score(PROMPT, [7, 8, 9]) for _ in range(2)]
    assert first == again
    assert 0 < sum(map(math.exp, first.logprobs)) < 1
    assert (await engine.score([*PROMPT, 5], [7, 8, 9])) != first
    assert engine.prompts == [PROMPT, PROMPT, [*PROMPT, 5]]


async def test_a_dead_engine_answers_nothing_and_its_watcher_returns(tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer)
    watcher = asyncio.create_task(engine.watch())
    await asyncio.sleep(0)
    assert not watcher.done()
    engine.die()
    await watcher
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        await engine.generate(PROMPT, Sampling(), None)
    with pytest.raises(EngineUnavailable):
        await engine.score(PROMPT, [1, 2])


async def test_it_refuses_a_grammar_that_does_not_compile(tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer)
    await engine.check_constraint(Constraint("guidance", "%llguidance {}\nstart: /a/"))
    with pytest.raises(ConstraintRefused):
        await engine.check_constraint(Constraint("guidance", "%llguidance {}\nstart: /(/"))
