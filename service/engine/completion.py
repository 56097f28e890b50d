"""What a request to a decoder-only model returns: a completion, or scores of candidate tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Completion:
    """A drawn completion. token_ids: with the token that ended it. logprobs: one for each token, under the distribution
    that it was drawn from. cached_tokens: how many of the prompt's tokens were in the prefix cache."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """logprobs: of each candidate as the next token, at temperature 1 over the whole vocabulary."""

    logprobs: tuple[float, ...]
    cached_tokens: int
