"""Owns the policy that is measured: the named one, with an end of turn that does not end a completion.

A policy trained to answer in a word would never give 16 tokens of free text, and the service has no way to ask it for
more. So every contender gets a copy of the policy's folder in which the end of turn is a token like any other and the
padding token, which is never drawn, ends a completion. The weights and the conversations are the same.
"""

import json
from pathlib import Path
from typing import Any


def endless(policy: Path, folder: Path) -> Path:
    """A copy of `policy` in `folder` with links to its weights; `policy` itself where it has no such tokens."""
    settings = policy / "tokenizer_config.json"
    told = _read(settings) if settings.exists() else {}
    end, padding = told.get("eos_token"), told.get("pad_token")
    vocabulary = (
        {added["content"]: added["id"] for added in _read(policy / "tokenizer.json")["added_tokens"]} if end else {}
    )
    if end not in vocabulary or padding not in vocabulary or "chat_template" not in told:
        return policy
    folder.mkdir()
    for path in policy.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    template = told["chat_template"].replace("eos_token", json.dumps(end))
    _write(folder / settings.name, {**told, "eos_token": padding, "chat_template": template})
    for name in ("config.json", "generation_config.json"):
        if (policy / name).exists():
            _write(folder / name, {**_read(policy / name), "eos_token_id": vocabulary[padding]})
    return folder


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, document: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # a link to the policy's own file
    path.write_text(json.dumps(document), encoding="utf-8")
