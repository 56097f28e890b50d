"""The text of token ids, exactly and piece by piece.

A token stands for bytes, and a character may be spread over several tokens. The decoders of Hugging Face tokenizers
work on whole lists: some strip the first space or clean up spaces, so the text of a stream, the text of the whole
completion, and the text that a grammar matched would differ. Here the bytes of the tokens are concatenated.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Protocol, cast

BytesOf = Callable[[int], bytes]
"""Returns the bytes of a token; none for a special token."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextDecoder(Protocol):
    """Decodes tokens that arrive one after the other."""

    def add(self, token_ids: Sequence[int]) -> str:
        """Returns the text that these tokens add. An incomplete character waits for the next tokens."""
        ...


def text_of(bytes_of: BytesOf | None, decode: Callable[[Sequence[int]], str]) -> TextDecoder:
    """Returns a decoder. `decode` decodes a whole list; it is used if the bytes of a token are unknown."""
    return _Bytes(bytes_of) if bytes_of else _Whole(decode)


class _Bytes:
    def __init__(self, bytes_of: BytesOf) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))


class _Whole:
    """Decodes all tokens again at each call."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_chars = 0

    def add(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        text = self._decode(self._ids).rstrip("\ufffd")
        added, self._num_chars = text[self._num_chars :], max(self._num_chars, len(text))
        return added


def byte_decoder(backend: Any, decoder: Any, added: Mapping[int, str], special: Set[int]) -> BytesOf | None:
    """Returns a function that finds the bytes of a token; None for a kind of decoder that it does not know.

    backend: a tokenizer of the `tokenizers` library. decoder: the specification of its decoder.
    added: the names of the added tokens, by id. special: the ids whose text is empty.
    """
    convert = _converter(decoder)
    if convert is None:
        return None
    known: dict[int, bytes] = dict.fromkeys(special, b"")
    known |= {id_: name.encode() for id_, name in added.items() if id_ not in special}

    def bytes_of(token_id: int) -> bytes:
        found = known.get(token_id)
        if found is None:
            found = known[token_id] = convert(backend.id_to_token(token_id) or "")
        return found

    return bytes_of


def _converter(decoder: Any) -> Callable[[str], bytes] | None:
    """Returns a function that converts the name of a token to its bytes; None if the decoder is of another kind."""
    parts = _flat(decoder)
    kinds = {part["type"] for part in parts}
    if kinds == {"ByteLevel"}:
        return _from_byte_level
    if not kinds or not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    replaced: list[tuple[str, str]] = []
    for part in parts:
        if part["type"] == "Metaspace":
            replaced.append((part["replacement"], " "))
        elif part["type"] == "Replace":
            if "String" not in part["pattern"]:
                return None
            replaced.append((part["pattern"]["String"], part["content"]))
    has_bytes = "ByteFallback" in kinds

    def from_pieces(name: str) -> bytes:
        if has_bytes and (found := _BYTE.fullmatch(name)):
            return bytes.fromhex(found[1])
        for old, new in replaced:
            name = name.replace(old, new)
        return name.encode()

    return from_pieces


def _flat(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    part = cast("dict[str, Any]", decoder)
    inner: list[Any] = part.get("decoders") or []
    return [leaf for child in inner for leaf in _flat(child)] if part["type"] == "Sequence" else [part]


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte of each character in which byte-level tokenizers write bytes: printable ASCII and Latin-1
    characters stand for themselves, the others for the bytes that are left over."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _from_byte_level(name: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in name)
    except KeyError:
        return name.encode()
