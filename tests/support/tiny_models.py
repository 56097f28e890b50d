"""Tiny Llama models that draw every token with the same probability, whatever the prompt."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_model(
    folder: Path, tokenizer: Any, *, vocab_size: int | None = None, sick_tokens: tuple[int, ...] = ()
) -> Path:
    """Writes a model and its tokenizer into `folder`, and returns `folder`.

    vocab_size: number of embeddings; by default one for each token.
    sick_tokens: tokens with an embedding that is not a number. The model does not draw them.
    """
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        for token in sick_tokens:
            model.model.embed_tokens.weight[token] = float("nan")
            model.lm_head.weight[token] = -1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
