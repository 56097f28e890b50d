"""Tiny encoder-decoder models with random weights, and a tokenizer of T5's kind."""

# ruff: noqa: S106 - names of tokens are not passwords

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

Family = Literal["t5", "mt5", "bart"]
PAD, END, UNKNOWN = 0, 1, 2
_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}


def tokenizer() -> Any:
    """Unigram with T5's special tokens. It puts a space before each text and the end token after it, and reads a line
    break as a space."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -4.0 - code / 100) for code in range(33, 127)]
    pieces += [("▁go", -3.0), ("▁left", -3.0), ("▁right", -3.0), ("▁turn", -3.0), ("▁on", -3.0), ("▁off", -3.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    core.add_special_tokens([name for name, _ in pieces[:3]])
    core.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )


def make_model(folder: Path, family: Family = "t5", *, sick_from: int | None = None, **config: Any) -> Path:
    """Writes a model and its tokenizer into `folder`, and returns `folder`.

    sick_from: for bart, the encoder's first position whose embedding is not a number.
    """
    torch.manual_seed(1)
    own = tokenizer()
    ids = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    if family == "bart":
        model: Any = BartForConditionalGeneration(_bart(len(own), ids, config))
    elif family == "mt5":
        model = MT5ForConditionalGeneration(MT5Config(vocab_size=len(own), **{**_SIZES, **ids, **config}))
    else:
        model = T5ForConditionalGeneration(T5Config(vocab_size=len(own), **{**_SIZES, **ids, **config}))
    if sick_from is not None:
        with torch.no_grad():
            model.get_encoder().embed_positions.weight[sick_from:] = float("nan")
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, seed: int) -> Path:
    """Writes a LoRA adapter with random weights for a model into `folder`, and returns `folder`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def _bart(vocab_size: int, ids: dict[str, int], config: dict[str, Any]) -> BartConfig:
    return BartConfig(
        vocab_size=vocab_size,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=256,
        init_std=0.3,
        forced_bos_token_id=5,
        forced_eos_token_id=None,
        bos_token_id=3,
        **ids,
        **config,
    )
