"""The token log: the history of an episode for a decoder-only model.

The log contains exactly the tokens that the policy saw and drew, except thoughts of earlier steps that the episode does
not keep. It is append-only. A window of the log consists of step 0 (instructions, goal, first observation, first
action) and every step from `start` on. If the context is full, the window slides: `start` increases, and no token
changes.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable

from service.engine import supports
from service.trajectory import Span, Step


class TokenLog:
    """The token ids of an episode's steps, without dropped thoughts.

    start: the first step after step 0 that the current window contains. Later windows never start earlier.
    """

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
        """Returns the number of tokens."""
        return len(self._ids)

    @property
    def num_steps(self) -> int:
        return len(self._ends)

    def append(self, step: Step) -> None:
        """Adds a committed step, and sets `start` to that of its window."""
        self.append_span(step.span, step.dropped)
        self.start = step.window_start

    def append_span(self, span: Span, dropped: tuple[int, int] = (0, 0)) -> None:
        """Adds the span of a step without its range `dropped`."""
        self._ids.extend(span.token_ids[: dropped[0]])
        self._ids.extend(span.token_ids[dropped[1] :])
        self._ends.append(len(self._ids))

    def window_len(self, start: int) -> int:
        """Returns the number of tokens of the window from `start`."""
        return len(self._ids) - self._dropped(start)

    def window(self, start: int) -> list[int]:
        """Returns the token ids of the window from `start`: step 0 and the steps from `start` on."""
        if not self._dropped(start):
            return self._ids.tolist()
        return self._ids[: self._ends[0]].tolist() + self._ids[self._ends[start - 1] :].tolist()

    def fit(self, turn_len: int, limit: int, *, slides: bool = True) -> int | None:
        """Returns the `start` of a window that, together with a new turn, fits into the context; None if none fits.

        turn_len: number of tokens of the turn.
        limit: maximum number of tokens of the window and the turn.
        slides: whether steps may be dropped. If so, and only if not everything fits, the oldest steps are dropped until
        half of the room after step 0 is free. Dropping many steps at once keeps the engine's cached prefix valid for
        many steps.
        """
        if self.window_len(self.start) + turn_len <= limit:
            return self.start
        if not slides:
            return None
        head = self._ends[0] if self._ends else 0
        room = limit - turn_len - head
        if room < 0 or not self._ends:
            return None
        # The first step from which the rest of the log takes at most half of the room. An empty rest always does.
        start = bisect_left(self._ends, len(self._ids) - room // 2) + 1
        return max(start, self.start)

    def _dropped(self, start: int) -> int:
        """Returns the number of tokens between step 0 and step `start`, which the window leaves out."""
        return self._ends[min(start, len(self._ends)) - 1] - self._ends[0] if self._ends else 0


def joined(first: Span, second: Span) -> Span:
    """Concatenates two spans."""
    return Span(
        first.token_ids + second.token_ids,
        first.loss_mask + second.loss_mask,
        first.logprobs + second.logprobs,
        support=first.support + second.support,
    )


def closed_span(turn: list[int], completion: Span, terminator: int) -> Span:
    """Makes the span of a step: its turn, the completion, and the terminator if the completion does not end with it."""
    drawn = completion.token_ids
    end = [] if drawn and drawn[-1] == terminator else [terminator]
    before, after = (supports.run(len(ids), supports.NOT_DRAWN) for ids in (turn, end))
    return Span(
        array("i", turn) + drawn + array("i", end),
        bytes(len(turn)) + completion.loss_mask + bytes(len(end)),
        array("f", bytes(4 * len(turn))) + completion.logprobs + array("f", bytes(4 * len(end))),
        support=before + completion.support + after,
    )
