"""Makes the policy that is measured: a copy whose completions do not stop at the end of a turn.

The packaged policy answers with one word and would never generate 16 tokens of free text. So all contenders use a copy
of its folder in which the end-of-turn token is an ordinary token. Instead, the padding token, which is never sampled,
ends a completion. Weights and conversations stay the same.
"""

import json
from pathlib import Path
from typing import Any


def endless(policy: Path, folder: Path) -> Path:
    """Makes the copy of `policy` in `folder`, with links to the weights, and returns its path.

    Returns `policy` itself if its tokenizer does not define the needed tokens.
    """
    settings = policy / "tokenizer_config.json"
    config = _read(settings) if settings.exists() else {}
    end, padding = config.get("eos_token"), config.get("pad_token")
    vocabulary = (
        {added["content"]: added["id"] for added in _read(policy / "tokenizer.json")["added_tokens"]} if end else {}
    )
    if end not in vocabulary or padding not in vocabulary or "chat_template" not in config:
        return policy
    folder.mkdir()
    for path in policy.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    template = config["chat_template"].replace("eos_token", json.dumps(end))
    _write(folder / settings.name, {**config, "eos_token": padding, "chat_template": template})
    for name in ("config.json", "generation_config.json"):
        if (policy / name).exists():
            _write(folder / name, {**_read(policy / name), "eos_token_id": vocabulary[padding]})
    return folder


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, document: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # it is a link: writing through it would change the original policy
    path.write_text(json.dumps(document), encoding="utf-8")
