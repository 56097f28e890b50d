"""Tokenizers: the interface that engines use, and its implementation for Hugging Face tokenizers."""

import json
import re
import secrets
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, cast

from cachetools import LRUCache, cachedmethod
from tokenizers import Tokenizer as FastTokenizer

from service.engine.token_text import TextDecoder, byte_decoder, text_of

_NUM_CACHED_TOKENS = 1 << 20
"""Size of the cache of encodings: about 40 MB."""

Content = str | list[dict[str, str]]
Messages = Sequence[dict[str, Content]]
"""A conversation. The content of a message is a text, or a list of parts for templates that require it."""


class Tokenizer(Protocol):
    """A tokenizer and its chat template."""

    eos_token_id: int | None
    control_tokens: dict[str, int]
    """The control tokens of prompts, such as the start of a turn, by name."""
    max_token_id: int
    """The largest id that encoded text can contain."""
    bos_token_ids: list[int]
    """The special tokens that the tokenizer itself puts before a text that no chat template rendered."""

    def encode(self, text: str) -> list[int]:
        """Encodes text of callers exactly: `decode` returns the same text. The result never contains a control token,
        even if the text contains its name."""
        ...

    def encode_segment(self, text: str, *, is_first: bool) -> Sequence[int]:
        """Encodes text that follows a control token, or with `is_first` the first text of a prompt. Some tokenizers put
        a space before such a text."""
        ...

    def encode_input(self, text: str) -> list[int]:
        """Encodes the input of an encoder: text of callers, between the special tokens that the tokenizer puts around a
        text. The text itself never becomes a control token."""
        ...

    def split(self, text: str) -> list[int | str]:
        """Splits a template's text into the ids of its control tokens and the plain text between them."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decodes token ids, without special tokens, and without an incomplete character at the end."""
        ...

    def decoder(self) -> TextDecoder:
        """Returns a decoder for tokens that arrive one after the other. Its texts together equal that of `decode`."""
        ...

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Renders a conversation with the chat template. Raises LookupError if there is no template, and whatever the
        template raises."""
        ...

    def canonical(self, messages: Messages) -> list[int]:
        """Returns the template's own tokenization of a conversation, including the generation prompt."""
        ...


class HFTokenizer:
    """Adapts a tokenizer of the transformers library.

    If the tokenizer is backed by the `tokenizers` library, that is called directly: it is faster, and copies of it can
    be changed. One copy encodes exactly and knows no control tokens. A second one is only made if the tokenizer puts a
    space before text.

    A control token is any added token except ordinary text: whitespace, or letters and digits that the chat template
    does not use. The flag `special` does not decide this: for example, `<think>` of Qwen3 has `special: false`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        template = str(tokenizer.chat_template or "")
        control = {str(token): id_ for id_, token in added.items() if _is_control(token, template)}
        self.control_tokens: dict[str, int] = control
        self._controls = _pattern([token for token in added.values() if str(token) in control])
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._exact = self._segments = self._firsts = None
        special = {id_ for id_, token in added.items() if token.special}
        self._bytes = None
        if backend is not None:
            spec: dict[str, Any] = json.loads(backend.to_str())
            self._bytes = byte_decoder(backend, spec["decoder"], {i: str(t) for i, t in added.items()}, special)
            self._exact, self._segments, self._firsts = _encoders(spec, control)
        self._encodings = LRUCache[Any, list[int]](_NUM_CACHED_TOKENS, getsizeof=len)
        self.max_token_id = max(set(tokenizer.get_vocab().values()) - set(control.values()), default=0)
        self.bos_token_ids, self._ending_token_ids = self._find_special()

    def encode(self, text: str) -> list[int]:
        return self._encode(self._exact, text)

    @cachedmethod(lambda self: self._encodings)
    def encode_segment(self, text: str, *, is_first: bool) -> Sequence[int]:
        """Cached, because instructions are the same in many episodes, and observations often recur."""
        return self._encode(self._firsts if is_first else self._segments, text)

    def encode_input(self, text: str) -> list[int]:
        return [*self.bos_token_ids, *self._encode(self._firsts, text), *self._ending_token_ids]

    def _encode(self, encoder: FastTokenizer | None, text: str) -> list[int]:
        if encoder is not None:
            return encoder.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def split(self, text: str) -> list[int | str]:
        if self._controls is None:
            return [text] if text else []
        parts = self._controls.split(text)
        # Odd elements are names of control tokens.
        return [self.control_tokens[part] if place % 2 else part for place, part in enumerate(parts) if part]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.decoder().add(token_ids)

    def decoder(self) -> TextDecoder:
        return text_of(self._bytes, self._decode_all)

    def _decode_all(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Raises LookupError if the model has no chat template, and whatever the template raises."""
        if not self._tokenizer.chat_template:
            raise LookupError("the tokenizer has no chat template")
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def canonical(self, messages: Messages) -> list[int]:
        text = self.render(messages, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _find_special(self) -> tuple[list[int], list[int]]:
        """Returns the special tokens that the tokenizer puts before a text, and those after it."""
        bare: list[int] = self._tokenizer.encode("a", add_special_tokens=False)
        full: list[int] = self._tokenizer.encode("a", add_special_tokens=True)
        if not bare or bare[0] not in full:
            return [], []
        start = full.index(bare[0])
        return full[:start], full[start + len(bare) :]


def tokenizer_json(tokenizer: Any) -> str | None:
    """Returns a Hugging Face tokenizer as the text of tokenizer.json; None if llguidance does not support it."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copied: Any = copy(backend)
    copied.no_padding()
    copied.no_truncation()
    spec: dict[str, Any] = json.loads(copied.to_str())
    decoder: dict[str, Any] = spec["decoder"] or {}
    if decoder.get("type") == "Metaspace":
        spec["decoder"] = _written_out(decoder["replacement"])
    return json.dumps(spec)


def _written_out(space: str) -> dict[str, Any]:
    """Returns the decoder Metaspace in a form that llguidance knows."""
    replace = {"type": "Replace", "pattern": {"String": space}, "content": " "}
    return {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}


def _is_control(token: Any, template: str) -> bool:
    name = str(token)
    if token.special:
        return True
    return not name.isspace() and (name in template or not all(char.isalnum() or char in " ▁" for char in name))


def _pattern(tokens: Sequence[Any]) -> re.Pattern[str] | None:
    """Returns a pattern that finds the names of tokens, with the whitespace around them that they absorb."""
    longest_first = sorted(tokens, key=lambda token: len(str(token)), reverse=True)
    if not longest_first:
        return None
    before = "|".join(re.escape(str(token)) for token in tokens if token.lstrip)
    after = "|".join(f"(?<={re.escape(str(token))})" for token in tokens if token.rstrip)
    names = "|".join(re.escape(str(token)) for token in longest_first)
    return re.compile(
        (rf"(?:\s*(?={before}))?" if before else "") + f"({names})" + (rf"(?:(?:{after})\s*)?" if after else "")
    )


def _encoders(spec: dict[str, Any], control: dict[str, int]) -> tuple[FastTokenizer, FastTokenizer, FastTokenizer]:
    """Returns copies of a tokenizer without control tokens: one that encodes exactly, one that encodes text after a
    control token, and one that encodes the first text of a prompt. Equal copies are one object."""
    spec = _without_tokens(spec, control)
    own = _load(spec)
    spaces = _first_spaces(spec["normalizer"]) + _first_spaces(spec["pre_tokenizer"])
    if not spaces:
        return own, own, own
    is_first_only = any(part.get("prepend_scheme") == "first" for part in spaces)
    for part in spaces:
        part.update(_NO_SPACE[part["type"]])
    exact = _load(spec)
    return exact, exact if is_first_only else own, own


_NO_SPACE: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Prepend": {"prepend": ""},
}
"""How to turn off the space that parts of a tokenizer put before text."""


def _load(spec: dict[str, Any]) -> FastTokenizer:
    return FastTokenizer.from_str(json.dumps(spec))


def _first_spaces(node: Any) -> list[dict[str, Any]]:
    """Returns the parts of a normalizer or pre-tokenizer that put a space before text."""
    if not isinstance(node, dict):
        return []
    part = cast("dict[str, Any]", node)
    inner: list[Any] = part.get("normalizers") or part.get("pretokenizers") or []
    adds = {
        "Metaspace": part.get("prepend_scheme", "always") != "never",
        "ByteLevel": part.get("add_prefix_space"),
        "Prepend": True,
    }
    return [part] if adds.get(part["type"]) else [found for child in inner for found in _first_spaces(child)]


def _without_tokens(spec: dict[str, Any], names: dict[str, int]) -> dict[str, Any]:
    """Returns the specification of a tokenizer in which no text can produce these tokens.

    They keep their ids but get secret names. They are also renamed in the model's own vocabulary, because some models
    find whole words there: Unigram, WordLevel, and BPE with `ignore_merges`.
    """
    secret = {name: f"\ue000{secrets.token_hex(16)}" for name in names}
    added = [{**token, "content": secret.get(token["content"], token["content"])} for token in spec["added_tokens"]]
    model: dict[str, Any] = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        vocab = cast("dict[str, int]", model["vocab"])
        model["vocab"] = {secret.get(piece, piece): id_ for piece, id_ in vocab.items()}
    else:
        model["vocab"] = [[secret.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        merges: list[Any] = model["merges"]
        model["merges"] = [merge for merge in merges if _merged(merge) not in secret]
    return {**spec, "added_tokens": added, "model": model, "post_processor": None, "padding": None, "truncation": None}


def _merged(merge: str | list[str]) -> str:
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
