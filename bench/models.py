"""The models that the benchmark is run on: the policy of `--model`, a small random Qwen3, and SmolLM2-135M."""

import json
from pathlib import Path
from typing import Any

from bench.contenders import ROOT
from bench.policy import endless
from bench.workloads import Model
from service.engine.fetch import FetchFailed, fetch


class Missing(RuntimeError):
    """A model is not there. The message says how to get it."""


def weights(model: Model, policy: Path, folder: Path) -> Path:
    """Returns the folder of a model's weights. Those that are made are made in `folder`. Raises Missing."""
    if model == "policy":
        return endless(policy, folder / "policy")
    return random_qwen3(policy, folder / "qwen3") if model == "qwen3" else _smollm2()


def random_qwen3(policy: Path, folder: Path) -> Path:
    """Makes a Qwen3 of the size of the packaged policy, with random weights and the policy's tokenizer.

    vLLM's /v1/systemone serves Qwen3, but not Llama. It requires that each of its labels is one token: the letters are,
    "yes" and "no" are added.
    """
    import torch
    from transformers import AddedToken, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in ("yes", "no")])
    sizes = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(
        **{name: sizes[name] for name in same}, vocab_size=-(-len(tokenizer) // 64) * 64, tie_word_embeddings=True
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _smollm2() -> Path:
    """Fetches SmolLM2 unless it is in the default data folder already."""
    try:
        return fetch("smollm2", ROOT / "data" / "models")
    except FetchFailed as error:
        raise Missing(str(error)) from error
