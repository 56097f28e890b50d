"""Grammars compile in a child process. If it takes too long, it is killed, and the next request starts a new one."""

import asyncio
import json
import os
import re
import signal
import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import uvloop

from service.engine import grammar
from service.engine.base import Constraint, ConstraintRefused, EngineUnavailable
from service.engine.grammar import GrammarChecker, TokenizerData
from service.engine.json_grammar import compiled
from service.engine.tokenizer import tokenizer_json
from service.validation.json_schema import Schema
from tests.support.serving import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIMPLE = Constraint("json", '{"type":"object","properties":{"x":{"enum":["a","b"]}},"required":["x"]}')


@pytest.fixture(scope="module")
def data(hf_tokenizer: Any) -> TokenizerData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of xgrammar, when it is imported
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(hf_tokenizer, vocab_size=832)
    return TokenizerData(info.serialize_json(), tokenizer_json(hf_tokenizer), 832, hf_tokenizer.eos_token_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker(data: TokenizerData) -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(data, limit_s=5.0)
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
        Constraint("json", '{"type": "strin"}'),
        Constraint("grammar", "x"),
        Constraint("lark", "x:"),
        Constraint("json", json.dumps({"type": "string", "pattern": "("})),
    ],
    ids=lambda constraint: constraint.spec,
)
async def test_what_does_not_compile_is_refused_with_a_reason(checker: GrammarChecker, constraint: Constraint):
    with pytest.raises(ConstraintRefused) as refused:
        await checker.check(constraint)
    assert str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).strip("^ ")
    assert not re.search(r"[0-9]:[0-9]{2}:|[.]cc|/project", str(refused.value)), "the library's source was shown"
    await checker.check(SIMPLE)


async def test_questions_at_once_get_their_own_answers(checker: GrammarChecker):
    good = [Constraint("regex", f"[ab]{{{number}}}") for number in range(1, 6)]
    bad = [Constraint("regex", "(" * number) for number in range(1, 6)]
    constraints = [constraint for pair in zip(good, bad, strict=True) for constraint in pair]
    results = await asyncio.gather(*map(checker.check, constraints), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ConstraintRefused] * 5


async def test_a_caller_that_leaves_takes_no_answer_along(checker: GrammarChecker):
    cancelled = asyncio.create_task(checker.check(Constraint("regex", "(a")))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await checker.check(Constraint("regex", "never asked before"))


async def test_slow_compilation_is_refused_and_the_next_succeeds(data: TokenizerData):
    properties = {f"property{number}": {"type": "string"} for number in range(10_000)}
    hostile = Constraint("json", json.dumps({"type": "object", "properties": properties}))
    checker = GrammarChecker(data, limit_s=1.0)
    try:
        with pytest.raises(ConstraintRefused, match="more than 1 s"):
            await checker.check(hostile)
        await checker.check(SIMPLE)
    finally:
        await checker.close()


async def test_the_child_that_died_is_replaced(checker: GrammarChecker):
    await checker.check(SIMPLE)
    child = checker._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    await checker.check(Constraint("regex", "after the death"))
    assert checker._child is not child


async def test_the_child_starts_without_a_fork_of_this_process(data: TokenizerData):
    """Handlers of fork that wait, such as torch's, must not stop the event loop of the server, which is uvloop."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(os.getpid()))

    async def check_one() -> None:
        checker = GrammarChecker(data, limit_s=5.0)
        await checker.check(SIMPLE)
        await checker.close()

    await asyncio.to_thread(uvloop.run, check_one())
    assert forks == []


async def test_closing_while_the_child_starts_ends_all_questions_and_starts_no_other(data: TokenizerData):
    checker = GrammarChecker(data, limit_s=5.0)
    checks = [asyncio.create_task(checker.check(Constraint("regex", letter))) for letter in "abc"]
    await until(lambda: checker._child)
    await checker.close()
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineUnavailable] * 3
    assert checker._child is None
    with pytest.raises(EngineUnavailable):
        await checker.check(SIMPLE)


async def test_closing_amid_a_compilation_blames_no_constraint(data: TokenizerData):
    checker = GrammarChecker(data, limit_s=60.0)
    await checker.check(SIMPLE)
    properties = {f"property{number}": {"type": "string"} for number in range(10_000)}
    slow = Constraint("json", json.dumps({"type": "object", "properties": properties}))
    check = asyncio.create_task(checker.check(slow))
    await until(checker._lock.locked)
    await checker.close()
    with pytest.raises(EngineUnavailable):
        await check


async def test_guidance_grammars_compile(checker: GrammarChecker):
    await checker.check(Constraint("guidance", compiled(Schema({"type": "string", "pattern": "^a"}), strict=True)))
    with pytest.raises(ConstraintRefused):
        await checker.check(Constraint("guidance", "%llguidance {}\nstart: missing"))
    with pytest.raises(
        ConstraintRefused,
        match=r"^the schema or the pattern is too complex to be enforced; ",
    ):
        await checker.check(Constraint("guidance", "%llguidance {}\nstart: T\nT: /(a{1000}){1000}/"))


async def test_a_tokenizer_that_is_not_supported_refuses_constraints_by_name(data: TokenizerData):
    checker = GrammarChecker(replace(data, llguidance=None), limit_s=5.0)
    with pytest.raises(ConstraintRefused, match="tokenizer"):
        await checker.check(Constraint("guidance", "%llguidance {}\nstart: /a/"))


async def test_out_of_memory_is_told_apart_from_a_crash(data: TokenizerData, monkeypatch: pytest.MonkeyPatch):
    checker = GrammarChecker(data, limit_s=60.0, limit_bytes=1 << 20)
    alternatives = " | ".join(f"/{number}/" for number in range(200_000))
    try:
        with pytest.raises(ConstraintRefused, match="memory"):
            await checker.check(Constraint("guidance", f"%llguidance {{}}\nstart: {alternatives}"))
    finally:
        await checker.close()


async def test_a_crash_is_tried_again_and_then_refused_as_a_crash(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
):
    exchange, children = grammar._Child.exchange, list[Any]()

    def crashing(child: Any, request: dict[str, Any]) -> Any:
        if "spec" in request:
            children.append(child)
            os.kill(child.pid, signal.SIGSEGV)
        return exchange(child, request)

    monkeypatch.setattr(grammar._Child, "exchange", crashing)
    with pytest.raises(ConstraintRefused, match="SIGSEGV"):
        await checker.check(Constraint("regex", "crashes"))
    assert len(set(children)) == 2
    monkeypatch.undo()
    await checker.check(Constraint("regex", "after the crash"))


async def test_a_caller_that_leaves_while_the_child_starts_takes_no_answer_along(data: TokenizerData):
    checker = GrammarChecker(data, limit_s=5.0)
    try:
        cancelled = asyncio.create_task(checker.check(SIMPLE))
        await until(lambda: checker._child)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        with pytest.raises(ConstraintRefused):
            await checker.check(Constraint("regex", "("))
        await checker.check(Constraint("regex", "[0-9]+"))
    finally:
        await checker.close()


WANTED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "object"}}, "json"),
    ({"json": '{"type":"object"}'}, "json"),
    ({"json_object": True}, "json"),
    ({"regex": "[ab]"}, "regex"),
    ({"choice": ["left", 'ri"ght']}, "grammar"),
    ({"grammar": 'root ::= "a" | "b"'}, "grammar"),
    ({"grammar": 'start: "a" | "b"'}, "lark"),
    (
        {
            "structural_tag": '{"type":"structural_tag","format":{"type":"triggered_tags","triggers":["<f>"],"tags":'
            '[{"begin":"<f>","content":{"type":"any_text"},"end":"</f>"}]}}'
        },
        "structural_tag",
    ),
    (
        {
            "structural_tag": '{"structures":[{"begin":"<f>","schema":{"type":"object"},"end":"</f>"}],'
            '"triggers":["<f>"]}'
        },
        "structural_tag",
    ),
]


class Client:
    """Replaces vLLM's engine, and counts the calls of `generate`."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.errored = False
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 832)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> Any:
        self.num_calls += 1
        yield request_id


async def _generate(checker: GrammarChecker, wanted: dict[str, Any] | None) -> Client:
    """Sends a request with a structured output through the check. Returns the client behind it."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from service.engine.vllm.openai_app import CheckedClient

    client = Client()
    params = SamplingParams(structured_outputs=wanted and StructuredOutputsParams(**wanted))
    checked: Any = CheckedClient(client, checker.check)
    assert checked.errored is False
    assert [output async for output in checked.generate({"prompt_token_ids": [0]}, params, "id")] == ["id"]
    return client


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it is imported
@pytest.mark.parametrize(("wanted", "kind"), WANTED)
async def test_v1_constraints_are_compiled_in_the_child_first(
    checker: GrammarChecker, wanted: dict[str, Any], kind: str
):
    checker._accepted.clear()
    assert (await _generate(checker, wanted)).num_calls == 1
    assert [constraint.kind for constraint in checker._accepted] == [kind]
    assert (await _generate(checker, None)).num_calls == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "wanted",
    [
        {"json": {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(40_000)}}},
        {"regex": "("},
        {"grammar": "root ::= (" * 1000},
        {"structural_tag": '{"structures":[{}],"triggers":[]}'},
        {"structural_tag": "[]"},
    ],
    ids=lambda wanted: str(wanted)[:30],
)
async def test_v1_refuses_slow_grammars(data: TokenizerData, wanted: dict[str, Any]):
    strict_checker = GrammarChecker(data, limit_s=1.0)
    try:
        with pytest.raises(ValueError, match="the structured output is refused"):
            await _generate(strict_checker, wanted)
    finally:
        await strict_checker.close()
