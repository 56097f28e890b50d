"""The messages between the service's process and the worker. They are pickled, so both must have the same version."""

from collections.abc import Sequence
from typing import Any

from service.trajectory import Sampling
from service.values import immutable

Branches = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Branches of a trie of actions: the path from the root, and the children."""


@immutable
class ModelOptions:
    """What the worker loads, and its limits.

    prefix: the ids that each reply begins with.
    max_len: maximum length of the encoder's input, and of the decoder's ids, in tokens.
    max_rows: maximum number of replies that are generated at the same time, and of paths that one pass scores.
    max_encoder_tokens: maximum size of the encoder states of all replies together, in tokens with padding.
    grammar_tokenizer: a tokenizer.json for llguidance; None if it does not support the tokenizer.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    prefix: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    max_len: int
    max_rows: int
    max_encoder_tokens: int
    num_threads: int | None
    grammar_tokenizer: str | None


@immutable
class Ready:
    """The first message of the worker: the model is loaded."""

    vocab_size: int
    dtype: str


@immutable
class Refused:
    """The first message of the worker, or the answer to `LoadAdapter`: it cannot be loaded, and why."""

    reason: str


@immutable
class Generate:
    """Asks for a reply. `grammar` is a grammar for llguidance.

    streams: whether the tokens are wanted one by one.
    """

    encoder_token_ids: Sequence[int]
    sampling: Sampling
    grammar: str | None = None
    adapter: str | None = None
    streams: bool = False


@immutable
class Score:
    """Asks for the log-probabilities of the children of each branch."""

    encoder_token_ids: Sequence[int]
    branches: Branches
    adapter: str | None = None


@immutable
class Cancel:
    """Ends a request without an answer."""


@immutable
class LoadAdapter:
    """Loads the LoRA adapter in this folder. The answer is Done or Refused."""

    name: str
    path: str


@immutable
class UnloadAdapter:
    """Unloads an adapter, once no reply in progress uses it. The answer is Done, at once."""

    name: str


@immutable
class Probe:
    """Asks whether the worker is alive. The answer is Done."""


@immutable
class Tokens:
    """The tokens of a reply so far, while it is generated, and their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@immutable
class Generated:
    """A complete reply. `finish_reason`: stop or length."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@immutable
class Scored:
    """The log-probabilities of the children of each branch."""

    logprobs: tuple[tuple[float, ...], ...]


@immutable
class Done:
    """The request was carried out."""


@immutable
class Failed:
    """The request failed, for a reason that concerns this request alone."""

    reason: str


@immutable
class Missing:
    """The request's adapter is not loaded (any more)."""


Request = Generate | Score | Cancel | LoadAdapter | UnloadAdapter | Probe
Answer = Tokens | Generated | Scored | Done | Refused | Failed | Missing
Numbered = tuple[int, Any]
"""A request with its number."""
