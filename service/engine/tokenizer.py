"""Tokenizers: what the engines need of one, and the adapter from a Hugging Face tokenizer."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as FastTokenizer


class Tokenizer(Protocol):
    """A Hugging Face tokenizer and its chat template, reduced to what an append-only log needs."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of user text. Never contains a special token, whatever the text says."""
        ...

    def split(self, text: str) -> list[int | str]:
        """A template's text as its special token ids and the plain text between them."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The chat template's text. Raises whatever the template raises."""
        ...

    def canonical(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The template's own tokenization of a conversation, generation prompt included."""
        ...


class HFTokenizer:
    """Wraps a transformers tokenizer; one that is backed by the `tokenizers` library is called without its wrapper."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._special: dict[str, int] = {
            str(added): token_id
            for token_id, added in tokenizer.added_tokens_decoder.items()
            if added.special or not str(added).isspace()
        }
        names = sorted(self._special, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._fast = _without_special_tokens(tokenizer)

    def encode(self, text: str) -> list[int]:
        if self._fast is not None:
            return self._fast.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def split(self, text: str) -> list[int | str]:
        if self._specials is None:
            return [text] if text else []
        return [self._special.get(part, part) for part in self._specials.split(text) if part]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Raises LookupError when the model has no chat template, else whatever the template raises."""
        if not self._tokenizer.chat_template:
            raise LookupError("the tokenizer has no chat template")
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def canonical(self, messages: Sequence[dict[str, str]]) -> list[int]:
        text = self.render(messages, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)


def _without_special_tokens(tokenizer: Any) -> FastTokenizer | None:
    """A private copy of the backend that reads special tokens in a text as the text they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = FastTokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    return copy
