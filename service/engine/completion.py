"""The results of requests to a decoder-only model: completions, and scores of candidate tokens."""

from collections.abc import Sequence

from service.engine.base import OnText
from service.engine.token_text import TextDecoder
from service.values import immutable


@immutable
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


@immutable
class Scores:
    """Scores of candidates for the next token.

    logprobs: one for each candidate, at temperature 1 over the whole vocabulary.
    cached_tokens: number of prompt tokens that were in the prefix cache.
    """

    logprobs: tuple[float, ...]
    cached_tokens: int


class CompletionText:
    """The text of a completion while it is generated: the text before the first stop string. It is emitted in pieces.

    Text that could be the start of a stop string is held back until that is ruled out. The engine may find a stop
    string some tokens late, behind an incomplete character; text from the stop string on is not emitted meanwhile.
    """

    def __init__(self, decoder: TextDecoder, stop: Sequence[str] = (), emit: OnText | None = None) -> None:
        self._decoder = decoder
        self._stop = stop
        self._emit = emit
        self._num_held_back = max((len(text) for text in stop), default=1) - 1
        self._text = ""
        self._num_tokens = self._num_emitted = 0

    def update(self, token_ids: Sequence[int]) -> bool:
        """Receives all tokens so far. Returns whether the text contains a stop string."""
        self._add(token_ids)
        end = self._end()
        self._emit_up_to(min(end, len(self._text) - self._num_held_back))
        return end < len(self._text)

    def finish(self, token_ids: Sequence[int]) -> str:
        """Receives all tokens of the text, and returns the text. All emitted pieces together equal it."""
        self._add(token_ids)
        self._text = self._text[: self._end()]
        self._emit_up_to(len(self._text))
        return self._text

    def _add(self, token_ids: Sequence[int]) -> None:
        self._text += self._decoder.add(token_ids[self._num_tokens :])
        self._num_tokens = len(token_ids)

    def _end(self) -> int:
        """Where the first stop string starts. What was emitted contains none."""
        places = [place for stop in self._stop if (place := self._text.find(stop, self._num_emitted)) >= 0]
        return min(places, default=len(self._text))

    def _emit_up_to(self, end: int) -> None:
        if self._emit and end > self._num_emitted:
            self._emit(self._text[self._num_emitted : end])
            self._num_emitted = end


def without_prefix(emit: OnText, prefix: str) -> OnText:
    """Returns a callback that leaves out the prefix, if the text starts with it, and passes the rest on."""
    if not prefix:
        return emit
    start: str | None = ""

    def receive(delta: str) -> None:
        nonlocal start
        if start is None:
            emit(delta)
            return
        start += delta
        if len(start) < len(prefix) and prefix.startswith(start):
            return
        rest, start = start.removeprefix(prefix), None
        if rest:
            emit(rest)

    return receive
