"""Grammars compile in a child process that is killed when it takes too long; the next question gets a new one."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from service.engine.base import Constraint, ConstraintRefused
from service.engine.grammar import GrammarChecker

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIMPLE = Constraint("json", '{"type":"object","properties":{"x":{"enum":["a","b"]}},"required":["x"]}')


@pytest.fixture(scope="module")
def tokenizer_info(hf_tokenizer: Any) -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, at import
        import xgrammar

        return xgrammar.TokenizerInfo.from_huggingface(hf_tokenizer, vocab_size=768).serialize_json()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker(tokenizer_info: str) -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(tokenizer_info, limit_s=5.0)
    yield made
    await made.close()


async def test_what_compiles_passes(checker: GrammarChecker):
    await checker.check(SIMPLE)
    await checker.check(Constraint("regex", "(left|right) [0-9]{1,3}"))


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "("),
        Constraint("regex", "[z-a]"),
        Constraint("json", "{not json"),
        Constraint("json", json.dumps({"type": "string", "pattern": "("})),
    ],
    ids=lambda constraint: constraint.spec,
)
async def test_what_does_not_compile_is_refused_with_a_reason(checker: GrammarChecker, constraint: Constraint):
    with pytest.raises(ConstraintRefused) as refused:
        await checker.check(constraint)
    assert str(refused.value)
    assert "\n" not in str(refused.value)
    await checker.check(SIMPLE)


async def test_questions_at_once_get_their_own_answers(checker: GrammarChecker):
    good = [Constraint("regex", f"[ab]{{{number}}}") for number in range(1, 6)]
    bad = [Constraint("regex", "(" * number) for number in range(1, 6)]
    questions = [constraint for pair in zip(good, bad, strict=True) for constraint in pair]
    answers = await asyncio.gather(*map(checker.check, questions), return_exceptions=True)
    assert [type(answer) for answer in answers] == [type(None), ConstraintRefused] * 5


async def test_a_caller_that_leaves_takes_no_answer_along(checker: GrammarChecker):
    leaver = asyncio.create_task(checker.check(Constraint("regex", "(a")))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    await checker.check(Constraint("regex", "never asked before"))


async def test_what_takes_too_long_is_refused_and_the_next_is_served(tokenizer_info: str):
    properties = {f"property{number}": {"type": "string"} for number in range(40_000)}
    hostile = Constraint("json", json.dumps({"type": "object", "properties": properties}))
    checker = GrammarChecker(tokenizer_info, limit_s=1.0)
    try:
        with pytest.raises(ConstraintRefused, match="within 1 s"):
            await checker.check(hostile)
        await checker.check(SIMPLE)
    finally:
        await checker.close()


async def test_the_child_that_died_is_replaced(checker: GrammarChecker):
    await checker.check(SIMPLE)
    child = checker._child
    assert child is not None
    child.kill()
    await child.wait()
    await checker.check(Constraint("regex", "after the death"))
    assert checker._child is not child
