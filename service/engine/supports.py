"""Supports: among which ids each token of a span was drawn, as a run-length code.

The code covers all tokens of a span with runs `num_tokens, kind, ids...`. A positive kind is a number of ids, which
follow: each token of the run was drawn among them. The other kinds have no ids.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence

from service.trajectory import Span

NOT_DRAWN = 0
"""Not drawn by the policy: a turn, a forced token of a discrete action, or an added terminator."""
ALL = -1
"""Drawn among the whole vocabulary."""
FILTERED = -2
"""Drawn, but the distribution is not a renormalisation of the model's over known ids."""
RECORDED = -3
"""Part of an action that somebody else chose."""

Ids = Sequence[int] | None
"""The ids among which a token was drawn; None for `FILTERED`."""


def run(num_tokens: int, kind: int) -> "array[int]":
    """Returns the code of tokens that are all of one kind without ids."""
    return array("i", (num_tokens, kind) if num_tokens else ())


def of_choice(num_tokens: int, drawn: Iterable[tuple[int, Ids]]) -> "array[int]":
    """Returns the code of a discrete action. `drawn`: the places of the drawn tokens, in order, with their ids."""
    code: list[int] = []
    end = 0
    for place, ids in drawn:
        if place > end:
            code += (place - end, NOT_DRAWN)
        code += (1, FILTERED) if ids is None else (1, len(ids), *ids)
        end = place + 1
    if num_tokens > end:
        code += (num_tokens - end, NOT_DRAWN)
    return array("i", code)


def runs(code: "array[int]") -> Iterator[tuple[int, int, "array[int]"]]:
    """Yields `(num_tokens, kind, ids)` for each run of a code."""
    start = 0
    while start < len(code):
        end = start + 2 + max(code[start + 1], 0)
        yield code[start], code[start + 1], code[start + 2 : end]
        start = end


def support_of(span: Span) -> "array[int]":
    """Returns the code of a span. A span without one is of an older version, or of an engine that writes none: its
    drawn tokens are `FILTERED`."""
    if span.support or not span.token_ids:
        return span.support
    return array("i", [value for drawn in span.loss_mask for value in (1, FILTERED if drawn else NOT_DRAWN)])
