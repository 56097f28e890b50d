"""Training on the trajectories of an encoder-decoder model, and the trained adapter in its engine."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForSeq2SeqLM

from service.agent.action_spaces import DiscreteSpace, TextSpace
from service.api.http.serialization import document
from service.engine.adapters import adopt
from service.engine.base import Adapter, Transcript, Wanted
from service.engine.seq2seq.engine import Seq2SeqEngine
from service.learning import TrainingRefused
from service.learning.likelihood import collate, token_logprobs
from service.learning.options import Method, Options
from service.learning.run import Base, train
from service.learning.trajectories import read
from service.trajectory import (
    Decision,
    EpisodeConfig,
    EpisodeState,
    Message,
    Sampling,
    Step,
    StopReason,
    StoredEpisode,
)
from tests.conftest import POLICY
from tests.support.acts import slot
from tests.support.tiny_seq2seq import make_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACTIONS = DiscreteSpace(("turn on", "turn off", "go", "left"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("t5"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[Seq2SeqEngine]:
    options = {"dtype": "float32", "enable_lora": True}
    loaded = await Seq2SeqEngine.load(str(folder), options, name="tiny", grammar_limit_s=30)
    yield loaded
    await loaded.close()


async def decide(engine: Seq2SeqEngine, place: int, space: Any = ACTIONS, adapter: Adapter | None = None) -> Decision:
    sampling = Sampling(seed=place, max_tokens=6)
    wanted = Wanted(sampling, lambda _: random.Random(place), slot, adapter=adapter)
    transcript = Transcript("Leave.", engine.history(), f"door {place % 4}", 512, slides=True)
    decision = await engine.decide(transcript, space, wanted)
    assert isinstance(decision, Decision)
    return decision


async def export(engine: Seq2SeqEngine, path: Path, space: Any = ACTIONS) -> Path:
    """Writes episodes of one step. The reward is 1 for the action `go`, and for a text that begins with a vowel."""
    decisions = await asyncio.gather(*(decide(engine, place, space) for place in range(32)))
    lines: list[str] = []
    for place, decision in enumerate(decisions):
        reward = float(decision.text == "go" or decision.text[:1] in "aeiou")
        name = f"e{place}"
        answer = {"text": decision.text, "policy_version": decision.policy_version, "reasoning": None}
        config = EpisodeConfig(name, {"policy": "tiny", "group": f"g{place % 4}"}, b"", decision.policy_version, 0.0)
        state = EpisodeState(1, "ended", StopReason.TERMINATED, success=bool(reward), episode_return=reward)
        row = Step(name, 0, Message("door"), False, decision.span, 1, answer, b"", 0.0, temperature=1.0)
        end = Step(name, 1, Message(reward=reward, terminated=True), True, decision.span, 1, answer, b"", 0.0)
        lines.append(json.dumps(document(StoredEpisode(config, state), [row, end], [], "tokens")))
    await asyncio.to_thread(path.write_text, "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("space", [ACTIONS, TextSpace()], ids=["choices", "text"])
async def test_likelihoods_of_padded_batches_equal_what_the_engine_stored(
    engine: Seq2SeqEngine, folder: Path, tmp_path: Path, space: Any
):
    episodes = read(await export(engine, tmp_path / "all.ndjson", space)).episodes
    rows = [row for episode in episodes for row in episode.rows]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found = token_logprobs(model, collate(rows)).numpy()
    stored = np.concatenate([row.logprobs for row in rows])
    assert len(stored) > 32
    assert np.abs(found - stored).max() < 1e-4
    assert len({row.prompt for row in rows}) == 4


@pytest.mark.parametrize("method", ["bc", "grpo"])
async def test_training_raises_the_rewarded_action_in_the_engine(
    engine: Seq2SeqEngine, folder: Path, tmp_path: Path, method: Method
):
    data = await export(engine, tmp_path / "all.ndjson")
    keep = {"keep": ("success",)} if method == "bc" else {}
    options = Options(method, learning_rate=0.02, epochs=6, batch_size=8, warmup_steps=0, **keep)
    card = train(options, data, Base(str(folder), "tiny"), tmp_path / "adapter")
    assert card["policy_version"]
    info = engine.info
    files = adopt(tmp_path / "adapter", tmp_path / "kept", base=info.weight_shapes, max_rank=info.max_lora_rank)
    adapter = Adapter(f"{method}@{files.digest[:12]}", "v", str(files.folder), files.rank)
    await engine.load_adapter(adapter)
    calls = [decide(engine, place, adapter=one) for place in range(8) for one in (None, adapter)]
    both = await asyncio.gather(*calls)
    before, after = ([one.action_probs["go"] for one in both[start::2]] for start in (0, 1))
    assert all(late > early + 0.1 for early, late in zip(before, after, strict=True))
    await engine.unload_adapter(adapter)
    again = await decide(engine, 0)
    assert again.action_probs["go"] == pytest.approx(before[0], abs=1e-5)


async def test_data_of_the_other_kind_of_model_is_refused(engine: Seq2SeqEngine, tmp_path: Path):
    data = await export(engine, tmp_path / "all.ndjson")
    options = Options("bc", keep=("success",), any_version=True)
    with pytest.raises(TrainingRefused, match="the base model is a decoder-only model"):
        train(options, data, Base(str(POLICY), "toy-text"), tmp_path / "adapter")
