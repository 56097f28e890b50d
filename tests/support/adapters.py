"""Makes LoRA adapters for the packaged policy. Their weights are random, so that each acts differently."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.conftest import POLICY


def make_adapter(
    folder: Path,
    seed: int,
    *,
    rank: int = 4,
    num_in: int | None = None,
    modules: Any = ("q_proj", "v_proj"),
    **config: Any,
) -> Path:
    """Writes the two files of a PEFT adapter into `folder`, and returns `folder`.

    With a `num_in` other than the policy's hidden size, the adapter belongs to another model. `config` overrides fields
    of adapter_config.json.
    """
    model = json.loads((POLICY / "config.json").read_text())
    width, heads = model["hidden_size"], model["num_attention_heads"]
    head_dim = model.get("head_dim") or width // heads
    kv_width, num_tokens = model["num_key_value_heads"] * head_dim, model["vocab_size"]
    outs = {"q_proj": heads * head_dim, "v_proj": kv_width, "lm_head": num_tokens}
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    layers = [f"model.layers.{layer}.self_attn." for layer in range(model["num_hidden_layers"])]
    for module in modules:
        for place in [""] if module == "lm_head" else layers:
            name = f"base_model.model.{place}{module}"
            tensors[f"{name}.lora_A.weight"] = random.normal(size=(rank, num_in or width)).astype(np.float32)
            shape = (outs.get(module, width), rank)
            tensors[f"{name}.lora_B.weight"] = random.normal(size=shape).astype(np.float32) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder
