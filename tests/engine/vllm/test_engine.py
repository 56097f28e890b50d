"""The vLLM engine with tiny models whose tokenizers and templates differ from those of the packaged policy."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.agent.action_spaces import DiscreteSpace, RegexSpace, TextSpace
from service.engine.base import EngineRefused, TextSink, Transcript, Wanted
from service.engine.vllm import path_scoring
from service.engine.vllm.engine import VLLMEngine
from service.engine.vllm.loading import EngineOptionError, build
from service.engine.vllm.openai_app import InferenceOptionError, check_options
from service.errors import PolicyFailed
from service.trajectory import Decision, Sampling
from tests.conftest import POLICY
from tests.support import tokenizers as kinds
from tests.support.acts import slot
from tests.support.tiny_models import make_model

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries that vLLM imports
]
OPTIONS = {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 16, "dtype": "float32"}
SICK, UNKNOWN = "#", "<unknown>"
"""A text whose token has no usable embedding, and an added token that has none at all."""


async def load(folder: Path, tokenizer: Any, **model: Any) -> VLLMEngine:
    path = str(make_model(folder / "models" / "tiny", tokenizer, **model))
    return await VLLMEngine.load(path, OPTIONS, name="tiny", aliases=(path,), grammar_limit_s=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chatml(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLMEngine]:
    """A base model with ChatML: its EOS token is not the end of a turn."""
    tokenizer = kinds.chatml(eos="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [UNKNOWN]})
    unknown, sick = tokenizer.convert_tokens_to_ids([UNKNOWN, SICK])
    engine = await load(tmp_path_factory.mktemp("chatml"), tokenizer, vocab_size=unknown, sick_tokens=(sick,))
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama_2(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLMEngine]:
    engine = await load(tmp_path_factory.mktemp("llama"), kinds.sentencepiece())
    yield engine
    await engine.close()


async def decide(
    engine: VLLMEngine, space: Any, observation: str = "look", deltas: list[str] | None = None, **sampling: Any
) -> Decision:
    sink = None if deltas is None else TextSink(lambda _, delta: deltas.append(delta))
    wanted = Wanted(Sampling(**sampling), lambda _: random.Random(), slot, sink=sink)
    decision = await engine.decide(Transcript("", engine.history(), observation, 4096, slides=True), space, wanted)
    assert isinstance(decision, Decision)
    return decision


def drawn(decision: Decision) -> list[int]:
    return [token for token, mask in zip(decision.span.token_ids, decision.span.loss_mask, strict=True) if mask]


async def test_a_reply_stops_at_the_templates_end_of_turn(chatml: VLLMEngine):
    end = chatml.tokenizer.control_tokens["<|im_end|>"]
    # Each reply ends with one of two tokens that are equally likely: none of 32 ends with this one once in 2**32 runs.
    decisions = await asyncio.gather(*(decide(chatml, TextSpace(), max_tokens=3000) for _ in range(32)))
    assert all(decision.finish_reason == "stop" for decision in decisions)
    assert any(drawn(decision)[-1] == end for decision in decisions), "no reply stopped at this token"
    assert all(end not in drawn(decision)[:-1] for decision in decisions), "a reply went on after its end"


async def test_probabilities_that_are_not_numbers_fail_by_name(chatml: VLLMEngine):
    actions = DiscreteSpace(("a", "b"))
    for space in (TextSpace(), actions, RegexSpace.of({"type": "regex", "pattern": "[a-z]+"})):
        with pytest.raises(PolicyFailed):
            await decide(chatml, space, f"look {SICK}", max_tokens=4)
        await decide(chatml, space, max_tokens=4)


async def test_a_streams_text_is_that_of_the_act_and_matches_the_pattern(llama_2: VLLMEngine):
    engine = llama_2
    for sampling in ({}, {"stop": ("o", "to ")}):
        for seed in range(4):
            deltas: list[str] = []
            heard = await decide(engine, TextSpace(), deltas=deltas, seed=seed, max_tokens=200, **sampling)
            assert "".join(deltas) == heard.text
            found = [stop for stop in sampling.get("stop", ()) if stop in heard.text]
            assert not found, (heard.text, heard.finish_reason, drawn(heard))
    for pattern in (" go( to)*", "go to", "(▁|é|🙂){3}"):
        deltas = []
        held = await decide(engine, RegexSpace.of({"type": "regex", "pattern": pattern}), deltas=deltas, max_tokens=200)
        assert "".join(deltas) == held.text
        assert held.finish_reason == "length" or re.fullmatch(pattern, held.text)


async def test_a_token_without_an_embedding_is_refused_and_the_engine_lives(chatml: VLLMEngine):
    size = chatml.info.vocab_size or 0
    app: Any = await chatml.openai_app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine", timeout=60) as client:
        for token in (size, size + 1):
            body = {"model": "tiny", "prompt": [1, token], "max_tokens": 2}
            assert (await client.post("/v1/completions", json=body)).status_code in (400, 422)
            streamed = await client.post("/v1/completions", json={**body, "stream": True})
            assert "out of" in streamed.text
        chat = {"model": "tiny", "messages": [{"role": "user", "content": UNKNOWN}], "max_tokens": 2}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 422
        await asyncio.sleep(0.1)
        assert chatml.healthy
        usual = await client.post("/v1/completions", json={"model": "tiny", "prompt": [1, 2], "max_tokens": 2})
        assert usual.status_code == 200, usual.text
        assert usual.json()["model"] == "tiny"
    await decide(chatml, TextSpace(), UNKNOWN, max_tokens=2)


async def test_v1_accepts_the_aliases_and_shows_no_path(chatml: VLLMEngine):
    app: Any = await chatml.openai_app()
    alias = next(iter(chatml._openai._served.aliases))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine", timeout=60) as client:
        answer = await client.post("/v1/completions", json={"model": alias, "prompt": [1, 2], "max_tokens": 2})
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["root"]) == ("tiny", "tiny")
        assert (await client.get(f"/v1/models/{alias}")).json()["id"] == "tiny"
    from prometheus_client import generate_latest

    assert b"models/tiny" not in generate_latest()


async def test_paths_are_not_scored_on_the_cpu(chatml: VLLMEngine):
    assert chatml.max_path_candidates == 0
    assert "requires the V2 model runner" in (await path_scoring.fault(chatml) or "")


@pytest.mark.parametrize(
    ("option", "setting"), [("served_model_name", "EPISODIC_MODEL_NAME"), ("model", "EPISODIC_MODEL")]
)
async def test_an_engine_option_that_is_a_setting_is_refused_by_name(option: str, setting: str):
    with pytest.raises(EngineOptionError, match=setting):
        build("model", "name", {option: "x"}, None)  # type: ignore[arg-type]


async def test_an_invalid_value_of_an_engine_option_is_refused_by_name():
    with pytest.raises(EngineRefused, match=r"EPISODIC_ENGINE__BLOCK_SIZE: Input should be a valid integer"):
        build(str(POLICY), "name", {"block_size": "seven"}, None)  # type: ignore[arg-type]


async def test_an_unknown_option_of_v1_is_refused_by_name():
    with pytest.raises(InferenceOptionError, match="EPISODIC_OPENAI__TOOL_PARSER"):
        check_options({"tool_parser": "hermes"})
