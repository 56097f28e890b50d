"""The engine of encoder-decoder models: a real worker with tiny models, compared with plain transformers."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForSeq2SeqLM

from service.agent.action_spaces import DiscreteSpace, RegexSpace, TextSpace
from service.engine.adapters import AdapterRefused
from service.engine.base import Adapter, EngineUnavailable, TextSink, Transcript, Wanted
from service.engine.decision_trie import Branch
from service.engine.seq2seq.engine import Seq2SeqEngine
from service.errors import PolicyFailed
from service.trajectory import Decision, Sampling
from tests.support.acts import slot
from tests.support.tiny_seq2seq import END, make_adapter, make_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4


async def load(folder: Path, **options: Any) -> Seq2SeqEngine:
    return await Seq2SeqEngine.load(str(folder), {"dtype": "float32", **options}, name="tiny", grammar_limit_s=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["t5", "mt5", "bart"])
async def each(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Seq2SeqEngine, Any]]:
    """An engine with few rows, and the same model in transformers."""
    folder = make_model(tmp_path_factory.mktemp(request.param), request.param)
    engine = await load(folder, max_rows=6)
    yield engine, AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def t5(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Seq2SeqEngine]:
    engine = await load(make_model(tmp_path_factory.mktemp("t5")))
    yield engine
    await engine.close()


async def decide(
    engine: Seq2SeqEngine, space: Any, observation: str = "look", deltas: list[str] | None = None, **sampling: Any
) -> Decision:
    sink = None if deltas is None else TextSink(lambda _, delta: deltas.append(delta))
    seed = sampling.get("seed")
    wanted = Wanted(Sampling(**sampling), lambda _: random.Random(seed), slot, sink=sink)
    decision = await engine.decide(Transcript("", engine.history(), observation, 512, slides=True), space, wanted)
    assert isinstance(decision, Decision)
    return decision


def inputs(num: int, sizes: tuple[int, int] = (2, 90)) -> list[list[int]]:
    generator = random.Random(3)
    return [[*(generator.randrange(3, 100) for _ in range(generator.randrange(*sizes))), END] for _ in range(num)]


def adapter(model: Path, folder: Path, seed: int) -> Adapter:
    return Adapter(f"{folder.name}@1", f"version {seed}", str(make_adapter(model, folder, seed)), 4)


async def later(number: int, call: Any) -> Any:
    await asyncio.sleep(0.002 * number)
    return await call


@torch.inference_mode()
def expected(model: Any, encoder_ids: list[int], decoder_ids: list[int]) -> torch.Tensor:
    """The log-probabilities behind each token, computed for this input alone."""
    out = model(input_ids=torch.tensor([encoder_ids]), decoder_input_ids=torch.tensor([decoder_ids]))
    return out.logits[0].log_softmax(-1)


async def test_replies_of_a_changing_batch_equal_those_of_transformers(each: tuple[Seq2SeqEngine, Any]):
    engine, model = each
    prefix, cases = engine.prompt.prefix, []
    for number, ids in enumerate(inputs(24)):
        sampling = Sampling(
            temperature=float(number % 2), seed=number, max_tokens=1 + 7 * (number % 5), stop_token_ids=(END,)
        )
        cases.append((ids, sampling))
    drawn = await asyncio.gather(*(later(n, engine.generate(*case, None)) for n, case in enumerate(cases)))
    for (ids, sampling), reply in zip(cases, drawn, strict=True):
        logprobs = expected(model, ids, [*prefix, *reply.token_ids[:-1]])[len(prefix) - 1 :]
        found = logprobs[range(len(reply.token_ids)), list(reply.token_ids)]
        assert (found - torch.tensor(reply.logprobs)).abs().max() < TOLERANCE
        assert reply.finish_reason == ("stop" if reply.token_ids[-1] == END else "length")
        assert len(reply.token_ids) <= sampling.max_tokens
        if not sampling.temperature:
            assert list(reply.token_ids) == logprobs.argmax(-1).tolist()


async def test_scores_of_a_whole_trie_equal_those_of_transformers(each: tuple[Seq2SeqEngine, Any]):
    engine, model = each
    paths = [(), (7,), (7, 9), (8,), (8, 4, 5, 6), *((50, other) for other in range(60, 80))]
    branches = [Branch(path, (0, 1, 2, 3), (10, 20, END)) for path in paths]
    scores = await asyncio.gather(*(engine.score(ids, branches) for ids in inputs(9)))
    for ids, found in zip(inputs(9), scores, strict=True):
        for branch, score in zip(branches, found, strict=True):
            logprobs = expected(model, ids, [*engine.prompt.prefix, *branch.path])[-1, list(branch.children)]
            assert (logprobs - torch.tensor(score.logprobs)).abs().max() < TOLERANCE


async def test_generated_text_equals_that_of_generate(each: tuple[Seq2SeqEngine, Any]):
    engine, model = each
    for ids in inputs(4):
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, num_beams=1)[0]
        prefix = engine.prompt.prefix
        wanted = out[len(prefix) :].tolist()[: 12 - len(prefix) + 1]
        reply = await engine.generate(ids, Sampling(temperature=0, max_tokens=len(wanted), stop_token_ids=(END,)), None)
        assert out[: len(prefix)].tolist() == prefix
        assert list(reply.token_ids) == wanted


async def test_probabilities_of_actions_are_the_products_along_their_tokens(t5: Seq2SeqEngine):
    actions = ("turn on", "turn off", "go", "left")
    decision = await decide(t5, DiscreteSpace(actions), temperature=1)
    mass = dict.fromkeys(actions, 1.0)
    branches = t5.trie(actions).branches
    scores = await t5.score(list(decision.span.encoder_token_ids or ()), branches)
    for branch, score in zip(branches, scores, strict=True):
        shares = torch.tensor(score.logprobs).softmax(-1).tolist()
        for child, share in enumerate(shares):
            for row in range(branch.bounds[child], branch.bounds[child + 1]):
                mass[t5.trie(actions).actions[row]] *= share
    assert decision.action_probs == pytest.approx(mass, abs=1e-5)
    assert (decision.span.token_ids[0], decision.span.token_ids[-1]) == (0, END)
    assert sum(decision.span.loss_mask) in (1, 2)


async def test_a_seed_gives_the_same_reply_alone_and_in_a_batch(t5: Seq2SeqEngine):
    alone = [await decide(t5, TextSpace(), f"look {n}", seed=n, max_tokens=20) for n in range(6)]
    noise = [decide(t5, TextSpace(), f"noise {n}", max_tokens=30) for n in range(20)]
    together = await asyncio.gather(
        *(decide(t5, TextSpace(), f"look {n}", seed=n, max_tokens=20) for n in range(6)), *noise
    )
    assert [one.span.token_ids for one in alone] == [one.span.token_ids for one in together[:6]]


async def test_filters_leave_out_the_unlikely_tokens(t5: Seq2SeqEngine):
    (ids,) = inputs(1)
    greedy = await t5.generate(ids, Sampling(temperature=0, max_tokens=8), None)
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        reply = await t5.generate(ids, Sampling(temperature=1.5, max_tokens=8, **filters), None)
        assert reply.token_ids == greedy.token_ids
        assert reply.logprobs == pytest.approx([0.0] * 8, abs=1e-5)
    drawn = [await t5.generate(ids, Sampling(top_k=2, max_tokens=1, temperature=9.0), None) for _ in range(40)]
    assert len({reply.token_ids for reply in drawn}) == 2


async def test_temperatures_scale_the_logits(t5: Seq2SeqEngine):
    (ids,) = inputs(1)
    replies = [await t5.generate(ids, Sampling(temperature=3.0, max_tokens=1, seed=n), None) for n in range(3)]
    (scores,) = await t5.score(ids, [Branch((), tuple(range(104)), tuple(range(103)))])
    scaled = (torch.tensor(scores.logprobs) / 3.0).log_softmax(-1)
    for reply in replies:
        assert reply.logprobs[0] == pytest.approx(float(scaled[reply.token_ids[0]]), abs=1e-3)


async def test_a_stop_string_ends_the_text_before_it(t5: Seq2SeqEngine):
    for seed in range(4):
        whole = await decide(t5, TextSpace(), seed=seed, max_tokens=40)
        stop = whole.text[5:7]
        deltas: list[str] = []
        cut = await decide(t5, TextSpace(), deltas=deltas, seed=seed, max_tokens=40, stop=(stop,))
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert "".join(deltas) == cut.text
        assert cut.finish_reason == "stop"
        assert len(cut.span.token_ids) <= len(whole.span.token_ids)


async def test_a_text_matches_its_pattern(t5: Seq2SeqEngine):
    for pattern in ("(turn on|go left){2}", "[0-9]{3}", "a*b"):
        space = RegexSpace.of({"type": "regex", "pattern": pattern})
        await t5.check(space)
        deltas: list[str] = []
        decision = await decide(t5, space, deltas=deltas, max_tokens=60)
        assert "".join(deltas) == decision.text
        assert decision.finish_reason == "length" or re.fullmatch(pattern, decision.text)


async def test_a_cancelled_reply_frees_its_row(tmp_path: Path):
    engine = await load(make_model(tmp_path / "t5"), max_rows=1)
    endless = Sampling(max_tokens=500)
    first = asyncio.create_task(engine.generate(inputs(1)[0], endless, None))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    before = engine.heartbeat
    await engine.generate(inputs(1)[0], Sampling(max_tokens=1), None)
    assert engine.heartbeat - before < 5
    await engine.close()


async def test_probabilities_that_are_not_numbers_fail_alone(tmp_path: Path):
    engine = await load(make_model(tmp_path / "bart", "bart", sick_from=60))
    for space in (TextSpace(), DiscreteSpace(("go", "left"))):
        for _ in range(2):
            healthy = [decide(engine, space, f"look {n}", max_tokens=20) for n in range(4)]
            sick = decide(engine, space, "look " * 20, max_tokens=20)
            *fine, failed = await asyncio.gather(*healthy, sick, return_exceptions=True)
            assert isinstance(failed, PolicyFailed)
            assert all(isinstance(one, Decision) for one in fine)
    await engine.close()


async def test_each_request_gets_its_own_adapter_in_any_order(tmp_path: Path):
    folder = make_model(tmp_path / "t5")
    engine = await load(folder, enable_lora=True)
    (ids,), root = inputs(1), [Branch((), (0, 1, 2, 3), (10, 20, END))]
    one, two = (adapter(folder, tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
    expected: dict[Adapter | None, float] = {None: (await engine.score(ids, root))[0].logprobs[0]}
    for new in (one, two):
        await engine.score(ids, root)
        await engine.load_adapter(new)
        expected[new] = (await engine.score(ids, root, adapter=new))[0].logprobs[0]  # right after it was loaded
    assert len({round(value, 3) for value in expected.values()}) == 3
    for order in ((None, two, one), (one, None, two), (two, one, None)):
        for used in order:
            assert (await engine.score(ids, root, adapter=used))[0].logprobs[0] == pytest.approx(
                expected[used], abs=1e-4
            )
    used = [None, one, two] * 4
    scores = await asyncio.gather(*(engine.score(ids, root, adapter=one) for one in used))
    for adapter_, (score,) in zip(used, scores, strict=True):
        assert score.logprobs[0] == pytest.approx(expected[adapter_], abs=1e-4)
    await engine.close()


async def test_an_adapter_is_unloaded_after_the_replies_that_use_it(tmp_path: Path):
    folder = make_model(tmp_path / "t5")
    engine = await load(folder, enable_lora=True)
    own = adapter(folder, tmp_path / "own", 1)
    await engine.load_adapter(own)
    endless = Sampling(max_tokens=300, seed=1)
    replies = [asyncio.create_task(engine.generate(ids, endless, None, adapter=own)) for ids in inputs(3)]
    await asyncio.sleep(0.05)
    await engine.unload_adapter(own)
    assert {reply.finish_reason for reply in await asyncio.gather(*replies)} == {"length"}
    with pytest.raises(EngineUnavailable, match="the policy's adapter was unloaded"):
        await engine.generate(inputs(1)[0], endless, None, adapter=own)
    await engine.load_adapter(own)
    await engine.generate(inputs(1)[0], Sampling(max_tokens=1), None, adapter=own)
    assert engine.healthy
    await engine.close()


async def test_an_adapter_that_cannot_be_loaded_leaves_the_base_model_as_it_is(tmp_path: Path):
    folder = make_model(tmp_path / "t5")
    engine = await load(folder, enable_lora=True)
    (ids,), root = inputs(1), [Branch((), (0, 1, 2, 3), (10, 20, END))]
    before = await engine.score(ids, root)
    other = make_model(tmp_path / "wide", d_ff=160)
    for wrong in (adapter(other, tmp_path / "wrong", 1), Adapter("none@1", "v", str(tmp_path / "none"), 4)):
        with pytest.raises(AdapterRefused):
            await engine.load_adapter(wrong)
        assert (await engine.score(ids, root))[0].logprobs == pytest.approx(before[0].logprobs, abs=1e-5)
    await engine.close()


async def test_requests_in_flight_fail_when_the_worker_dies(tmp_path: Path):
    engine = await load(make_model(tmp_path / "t5"))
    calls = [asyncio.create_task(engine.generate(ids, Sampling(max_tokens=500), None)) for ids in inputs(8)]
    await asyncio.sleep(0.05)
    engine.kill()
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, EngineUnavailable)
    await asyncio.wait_for(engine.watch(), 10)
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        await engine.probe()
    await engine.close()


async def test_many_long_actions_are_scored_in_parts(t5: Seq2SeqEngine):
    generator = random.Random(5)
    actions = tuple({"".join(generator.choices("abcdef", k=40)) for _ in range(1024)})
    decision = await decide(t5, DiscreteSpace(actions), temperature=1, seed=1)
    assert decision.action in actions
    every = await decide(t5, DiscreteSpace(actions[:64]), temperature=1, seed=1)
    assert sum((every.action_probs or {}).values()) == pytest.approx(1)
