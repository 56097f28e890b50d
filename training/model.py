"""The architecture of the packaged policy (a small Llama) and its export for serving."""

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.tokenizer import MAX_POSITIONS


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A new model with random weights.

    The vocabulary size is a multiple of 64, and the heads have 64 dimensions, because vLLM's CPU kernels need this.
    """
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the policy to `folder` in the format of Transformers and vLLM.

    The folder gets the weights in bfloat16, the tokenizer and the chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    served = LlamaForCausalLM(model.config).to(torch.bfloat16)
    served.load_state_dict(weights)
    served.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    served.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    for file in folder.iterdir():
        file.chmod(0o644)
