"""Grammars compile in a child process. If it takes too long, it is killed, and the next request starts a new one."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Literal

import pytest
import pytest_asyncio
from pydantic import BaseModel, Field

from service.agent.action_spaces import ToolsSpace
from service.engine.base import Constraint, ConstraintRefused, EngineUnavailable
from service.engine.grammar import GrammarChecker
from service.engine.strict_schema import strict
from tests.support.serving import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIMPLE = Constraint("json", '{"type":"object","properties":{"x":{"enum":["a","b"]}},"required":["x"]}')


@pytest.fixture(scope="module")
def tokenizer_info(hf_tokenizer: Any) -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of xgrammar, when it is imported
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
    constraints = [constraint for pair in zip(good, bad, strict=True) for constraint in pair]
    results = await asyncio.gather(*map(checker.check, constraints), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ConstraintRefused] * 5


async def test_a_caller_that_leaves_takes_no_answer_along(checker: GrammarChecker):
    cancelled = asyncio.create_task(checker.check(Constraint("regex", "(a")))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await checker.check(Constraint("regex", "never asked before"))


async def test_slow_compilation_is_refused_and_the_next_succeeds(tokenizer_info: str):
    properties = {f"property{number}": {"type": "string"} for number in range(10_000)}
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


async def test_closing_while_the_child_starts_ends_all_questions_and_starts_no_other(tokenizer_info: str):
    checker = GrammarChecker(tokenizer_info, limit_s=5.0)
    checks = [asyncio.create_task(checker.check(Constraint("regex", letter))) for letter in "abc"]
    await until(lambda: checker._child)
    await checker.close()
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineUnavailable] * 3
    assert checker._child is None
    with pytest.raises(EngineUnavailable):
        await checker.check(SIMPLE)


async def test_closing_amid_a_compilation_blames_no_constraint(tokenizer_info: str):
    checker = GrammarChecker(tokenizer_info, limit_s=60.0)
    await checker.check(SIMPLE)
    properties = {f"property{number}": {"type": "string"} for number in range(10_000)}
    slow = Constraint("json", json.dumps({"type": "object", "properties": properties}))
    check = asyncio.create_task(checker.check(slow))
    await until(checker._lock.locked)
    await checker.close()
    with pytest.raises(EngineUnavailable):
        await check


LIST = {"type": "array", "items": {"type": "integer"}}
OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "string", "enum": ["a", 1]}, "a", 1),
        ({"enum": [1, 9], "maximum": 5}, 1, 9),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 9}, 8, 9),
        ({"type": "number", "minimum": 0.25, "maximum": 0.75}, 0.5, 0.8),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "abc", "abcd"),
        ({"type": "string", "pattern": "^a+$"}, "aa", "b"),
        ({**LIST, "minItems": 1, "maxItems": 2}, [1, 2], [1, 2, 3]),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [1], ["a"]),
        (OBJECT, {"a": 1}, {}),
        (OBJECT, {"a": 1}, {"a": "s"}),
        ({**OBJECT, "additionalProperties": {"type": "integer"}, "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
        (
            {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "integer"}},
            {"a": 1},
            {"b": 1},
        ),
        ({"type": ["integer", "null"], "minimum": 3}, None, 1),
        ({"type": "object", "anyOf": [OBJECT, {**OBJECT, "required": []}]}, {}, 5),
        ({"description": "d", "allOf": [OBJECT]}, {"a": 1}, {}),
    ],
)
async def test_the_grammar_holds_a_strict_schema(checker: GrammarChecker, schema: Any, valid: Any, invalid: Any):
    constraint = Constraint("json", json.dumps(strict(schema)))
    assert await checker.matches(constraint, json.dumps(valid))
    assert not await checker.matches(constraint, json.dumps(invalid))


async def test_grammar_ignores_the_refused_keywords(checker: GrammarChecker):
    """If this fails because a newer xgrammar enforces one of these keywords, it need not be refused any more."""
    for schema, invalid in (
        ({"type": "integer", "not": {"const": 5}}, 5),
        ({**OBJECT, "dependentRequired": {"a": ["b"]}}, {"a": 1}),
        ({**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"a": 1}),
        ({"minLength": 3}, "a"),
        ({"type": "integer", "enum": ["a"]}, "a"),
        ({**OBJECT, "anyOf": [{"required": ["b"]}]}, {"a": 1}),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "required": ["z"]}, {"y": 1}),
    ):
        assert await checker.matches(Constraint("json", json.dumps(schema)), json.dumps(invalid)), schema


async def test_a_caller_that_leaves_while_the_child_starts_takes_no_answer_along(tokenizer_info: str):
    checker = GrammarChecker(tokenizer_info, limit_s=5.0)
    try:
        cancelled = asyncio.create_task(checker.check(SIMPLE))
        await until(lambda: checker._child)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        with pytest.raises(ConstraintRefused):
            await checker.check(Constraint("regex", "("))
        assert await checker.matches(Constraint("regex", "[0-9]+"), "7")
    finally:
        await checker.close()


class Cell(BaseModel):
    kind: Literal["cell"]
    row: int = Field(ge=0, le=3, description="From the top.")


class Door(BaseModel):
    kind: Literal["door"]
    name: str = Field(max_length=8)


class Move(BaseModel):
    """Go somewhere."""

    to: Cell | Door = Field(discriminator="kind")
    via: list[Cell] = []
    how: Literal["walk", "run"] = Field("walk", description="How fast.")
    until: datetime | None = None
    chance: float = Field(0.5, gt=0, le=1)
    costs: dict[str, int] = {}
    last: Cell = Field(description="Where it is now.")


async def test_a_pydantic_models_schema_is_a_tools(checker: GrammarChecker):
    space = ToolsSpace.of({"tools": [{"name": "move", "parameters": Move.model_json_schema()}]})
    await checker.check(space.constraint)
    cell = {"kind": "cell", "row": 2}
    good = {"to": {"kind": "door", "name": "exit"}, "via": [cell], "how": "run", "last": cell}
    for arguments, is_valid in (
        (good, True),
        ({**good, "last": {"kind": "cell", "row": 4}}, False),
        ({**good, "how": "fly"}, False),
        ({**good, "to": {"kind": "door", "name": "a long name"}}, False),
        ({"to": cell}, False),
    ):
        call = {"name": "move", "arguments": arguments}
        assert await checker.matches(space.constraint, json.dumps(call)) == is_valid, arguments


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
    assert [output async for output in checked.generate("prompt", params, "id")] == ["id"]
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
async def test_v1_refuses_slow_grammars(tokenizer_info: str, wanted: dict[str, Any]):
    strict_checker = GrammarChecker(tokenizer_info, limit_s=1.0)
    try:
        with pytest.raises(ValueError, match="the structured output is refused"):
            await _generate(strict_checker, wanted)
    finally:
        await strict_checker.close()
