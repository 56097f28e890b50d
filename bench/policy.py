"""Makes the policy that is measured: a copy whose completions do not stop at the end of a turn.

The packaged policy answers with one word and would never generate 16 tokens of free text. So all contenders use a copy
of its folder in which the weights of the end-of-turn token are 0. Its logit is then 0, which is never the highest one.
Configuration, tokenizer and conversations stay the same.
"""

import json
from pathlib import Path
from typing import Any

_WEIGHTS = "model.safetensors"


def endless(policy: Path, folder: Path) -> Path:
    """Makes the copy of `policy` in `folder`, with links to the other files, and returns its path.

    Returns `policy` itself if its weights are in several files or its configuration names no single end-of-turn token.
    """
    end = _read(policy / "config.json").get("eos_token_id") if (policy / _WEIGHTS).exists() else None
    if not isinstance(end, int):
        return policy
    folder.mkdir()
    for path in policy.iterdir():
        if path.name != _WEIGHTS:
            (folder / path.name).symlink_to(path.resolve())
    _write_without(end, policy / _WEIGHTS, folder / _WEIGHTS)
    return folder


def _write_without(token: int, source: Path, target: Path) -> None:
    """Copies the weights. Those with which the model scores this token become 0."""
    from safetensors.torch import load_file, save_file

    weights = load_file(source)
    scores = weights.get("lm_head.weight", weights.get("model.embed_tokens.weight"))  # one matrix may serve as both
    assert scores is not None, "the model has no output matrix of a known name"
    scores[token] = 0
    save_file(weights, target, {"format": "pt"})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
