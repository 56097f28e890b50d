"""Which encoder-decoder models and engine options are refused, and in which words."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.agent.action_spaces import DiscreteSpace, RegexSpace
from service.engine.base import ConstraintRefused, EngineRefused
from service.engine.load import load_engine
from service.engine.seq2seq.engine import Seq2SeqEngine
from service.engine.seq2seq.loading import describe, is_encoder_decoder
from service.settings import Settings
from tests.conftest import POLICY
from tests.support.tiny_seq2seq import make_model

pytestmark = pytest.mark.asyncio

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "t5")


def change(model: Path, file: str = CONFIG, **fields: Any) -> None:
    path = model / file
    document = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


async def refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(EngineRefused) as refused:
        await Seq2SeqEngine.load(str(model), options, name="tiny", grammar_limit_s=30)
    return str(refused.value)


async def test_the_configuration_decides_which_engine_serves_a_model(model: Path, tmp_path: Path):
    assert is_encoder_decoder(str(model), {})
    assert not is_encoder_decoder(str(POLICY), {})
    assert not is_encoder_decoder(str(tmp_path), {})
    settings = Settings(model=str(model), data=tmp_path / "data", max_tokens=7)
    engine = await load_engine(settings)
    assert isinstance(engine, Seq2SeqEngine)
    assert engine.info.default_sampling.max_tokens == 7
    await engine.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "EPISODIC_ENGINE__DTYPE"),
        ({"max_num_seqs": 3}, "EPISODIC_ENGINE__MAX_NUM_SEQS: an encoder-decoder model has the options dtype, "),
        ({"max_rows": 0}, "EPISODIC_ENGINE__MAX_ROWS"),
        ({"max_encoder_tokens": 100}, "EPISODIC_ENGINE__MAX_ENCODER_TOKENS: it must be at least 512"),
    ],
)
async def test_an_invalid_option_is_named(model: Path, options: dict[str, Any], words: str):
    assert words in await refusal(model, **options)


async def test_a_length_beyond_learned_positions_is_refused(tmp_path: Path):
    folder = make_model(tmp_path / "bart", "bart")
    assert "the model has only 256 positions" in await refusal(folder, max_model_len=300)
    described = describe(str(make_model(tmp_path / "t5")), "tiny", {"max_model_len": 900}, None)
    assert described.info.max_model_len == 900, "T5 has no learned positions"


async def test_a_decoder_only_model_is_refused():
    assert "is not an encoder-decoder model" in await refusal(POLICY)


async def test_a_tokenizer_without_a_fast_version_is_refused(model: Path):
    (model / "tokenizer.json").unlink()
    change(model, "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    assert "ByT5Tokenizer has no fast version" in await refusal(model)


async def test_a_tokenizer_of_another_model_is_refused(model: Path):
    weights = load_file(model / WEIGHTS)
    change(model, vocab_size=20)
    cut = {name: value[:20].clone() if name == "shared.weight" else value for name, value in weights.items()}
    save_file(cut, model / WEIGHTS, metadata={"format": "pt"})
    assert "the tokenizer belongs to another model" in await refusal(model)
    assert not multiprocessing.active_children(), "the worker must not stay behind"


async def test_a_tokenizer_that_no_grammar_supports_serves_texts_and_refuses_patterns(model: Path):
    change(model, "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": False})
    engine = await Seq2SeqEngine.load(str(model), {}, name="tiny", grammar_limit_s=30)
    with pytest.raises(ConstraintRefused, match="not supported for json, regex and tools"):
        await engine.check(RegexSpace.of({"type": "regex", "pattern": "a+"}))
    await engine.check(DiscreteSpace(("go", "left")))
    await engine.close()


async def test_an_end_token_may_have_the_id_0(model: Path):
    for file in (CONFIG, "generation_config.json"):
        change(model, file, eos_token_id=0)
    assert describe(str(model), "tiny", {}, None).options.end_token_ids == (0,)


async def test_options_of_v1_are_refused(model: Path, tmp_path: Path):
    with pytest.raises(EngineRefused, match="does not serve /v1"):
        await load_engine(Settings(model=str(model), data=tmp_path, openai={"tool_call_parser": "hermes"}))


async def test_missing_weights_are_named(model: Path):
    weights = load_file(model / WEIGHTS)
    removed = next(name for name in weights if name.startswith("decoder.block.1"))
    save_file({name: value for name, value in weights.items() if name != removed}, model / WEIGHTS)
    assert removed in await refusal(model)


async def test_damaged_weights_are_refused(model: Path):
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:5000])
    assert str(model) in await refusal(model)


async def test_a_missing_shard_is_refused(model: Path):
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(model / WEIGHTS), "model-00001-of-00002.safetensors"),
    }
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in await refusal(model)


async def test_remote_code_is_refused_unless_it_is_allowed(model: Path):
    change(model, auto_map={"AutoConfig": "own.OwnConfig"}, model_type="own", architectures=None)
    (model / "own.py").write_text("raise SystemError('remote code ran')")
    assert not is_encoder_decoder(str(model), {})
    assert "trust_remote_code" in await refusal(model)


async def test_a_checkpoint_in_float16_runs_in_float32(model: Path):
    halves = {name: value.half() for name, value in load_file(model / WEIGHTS).items()}
    save_file(halves, model / WEIGHTS, metadata={"format": "pt"})
    change(model, dtype="float16")
    engine = await Seq2SeqEngine.load(str(model), {}, name="tiny", grammar_limit_s=30)
    assert engine.dtype == "float32"
    await engine.close()
    assert torch.float16 in {value.dtype for value in load_file(model / WEIGHTS).values()}
