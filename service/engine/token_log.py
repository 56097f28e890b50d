"""The token log: the history of a decoder-only model. The concatenated spans of a step's window are exactly what the
policy saw and drew, except thoughts of earlier steps that the episode does not keep.

The log is append-only. A window is step 0 (instructions, goal, first observation, first action) and then every step
from `start` on. Sliding moves `start` forward and never changes a token.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable

from service.trajectory import Span, Step


class TokenLog:
    """The token ids of an episode, one span a step, without what was dropped from it."""

    __slots__ = ("_ends", "_ids", "start")

    def __init__(self, spans: Iterable[Span] = (), start: int = 1) -> None:
        self._ids = array("i")
        self._ends: list[int] = []
        self.start = start
        for span in spans:
            self.append_span(span)

    def copy(self) -> "TokenLog":
        twin = TokenLog(start=self.start)
        twin._ids, twin._ends = self._ids[:], self._ends[:]
        return twin

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_steps(self) -> int:
        return len(self._ends)

    def append(self, step: Step) -> None:
        """Adds a committed step. Later windows start where its window did, or later."""
        self.append_span(step.span, step.dropped)
        self.start = step.window_start

    def append_span(self, span: Span, dropped: tuple[int, int] = (0, 0)) -> None:
        """Adds a span without the range `dropped` of it."""
        self._ids.extend(span.token_ids[: dropped[0]])
        self._ids.extend(span.token_ids[dropped[1] :])
        self._ends.append(len(self._ids))

    def window_len(self, start: int) -> int:
        """Tokens of the window that keeps step 0 and the steps from `start` on."""
        return len(self._ids) - self._dropped(start)

    def window(self, start: int) -> list[int]:
        """Token ids of the window that keeps step 0 and the steps from `start` on."""
        if not self._dropped(start):
            return self._ids.tolist()
        return self._ids[: self._ends[0]].tolist() + self._ids[self._ends[start - 1] :].tolist()

    def fit(self, turn_len: int, limit: int, *, slides: bool = True) -> int | None:
        """The `start` with which the window and a turn of `turn_len` tokens stay within `limit`; None if there is none.

        Drops nothing while everything fits. Otherwise, if it `slides`, drops the oldest whole steps until half of the
        room behind step 0 is free. Large chunks keep the engine's cached prefix valid for many steps between two drops.
        """
        if self.window_len(self.start) + turn_len <= limit:
            return self.start
        if not slides:
            return None
        head = self._ends[0] if self._ends else 0
        room = limit - turn_len - head
        if room < 0 or not self._ends:
            return None
        # The first step whose tail (all from it on) is at most half of the room; the end of the log always is.
        start = bisect_left(self._ends, len(self._ids) - room // 2) + 1
        return max(start, self.start)

    def _dropped(self, start: int) -> int:
        return self._ends[min(start, len(self._ends)) - 1] - self._ends[0] if self._ends else 0


def joined(first: Span, second: Span) -> Span:
    return Span(
        first.token_ids + second.token_ids, first.loss_mask + second.loss_mask, first.logprobs + second.logprobs
    )


def closed_span(turn: list[int], completion: Span, terminator: int) -> Span:
    """A step's span: its turn, what the policy drew, and the terminator if the policy did not come to it."""
    drawn = completion.token_ids
    end = [] if drawn and drawn[-1] == terminator else [terminator]
    return Span(
        array("i", turn) + drawn + array("i", end),
        bytes(len(turn)) + completion.loss_mask + bytes(len(end)),
        array("f", bytes(4 * len(turn))) + completion.logprobs + array("f", bytes(4 * len(end))),
    )
