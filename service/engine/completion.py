"""The results of requests to a decoder-only model: completions, and scores of candidate tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion that the model drew.

    token_ids: its tokens, including the token that ended it.
    logprobs: one for each token, under the distribution that the token was drawn from.
    cached_tokens: number of prompt tokens that were in the prefix cache.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of candidates for the next token.

    logprobs: one for each candidate, at temperature 1 over the whole vocabulary.
    cached_tokens: number of prompt tokens that were in the prefix cache.
    """

    logprobs: tuple[float, ...]
    cached_tokens: int
