"""Tokenizers: the interface that engines use, and its implementation for Hugging Face tokenizers."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as FastTokenizer


class Tokenizer(Protocol):
    """A tokenizer and its chat template."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Encodes text of callers. The result never contains a special token, even if the text contains its name."""
        ...

    def split(self, text: str) -> list[int | str]:
        """Splits a template's text into the ids of its special tokens and the plain text between them."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decodes token ids, without special tokens."""
        ...

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Renders a conversation with the chat template. Raises LookupError if there is no template, and whatever the
        template raises."""
        ...

    def canonical(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the template's own tokenization of a conversation, including the generation prompt."""
        ...


class HFTokenizer:
    """Adapts a tokenizer of the transformers library.

    If the tokenizer is backed by the `tokenizers` library, that is called directly, because it is faster.
    """

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
        """Raises LookupError if the model has no chat template, and whatever the template raises."""
        if not self._tokenizer.chat_template:
            raise LookupError("the tokenizer has no chat template")
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def canonical(self, messages: Sequence[dict[str, str]]) -> list[int]:
        text = self.render(messages, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)


def _without_special_tokens(tokenizer: Any) -> FastTokenizer | None:
    """Returns a copy of the backend that encodes names of special tokens as plain text; None if there is no backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = FastTokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    return copy
