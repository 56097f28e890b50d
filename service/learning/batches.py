"""How a batch is split into parts that fit into memory, and what its loss is divided by."""

from collections.abc import Iterator, Sequence

from service.learning.options import Options
from service.learning.units import Unit


def parts(units: Sequence[Unit], indices: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Splits a batch into parts of at most `max_tokens` tokens with padding, or of one unit, of similar lengths."""
    part: list[int] = []
    num_rows, longest = 0, 0
    for index in sorted(indices, key=lambda index: (_longest(units[index]), index)):
        rows, length = len(units[index]), _longest(units[index])
        if part and (num_rows + rows) * max(longest, length) > max_tokens:
            yield part
            part, num_rows, longest = [], 0, 0
        part.append(index)
        num_rows, longest = num_rows + rows, max(longest, length)
    if part:
        yield part


def _longest(unit: Unit) -> int:
    return max(example.row.length for example in unit)


def loss_size(batch: Sequence[int], units: Sequence[Unit], options: Options) -> float:
    """What the sum of the losses of a batch is divided by; see `losses`."""
    if options.method == "dpo":
        return float(len(batch))
    examples = [example for index in batch for example in units[index]]
    if options.method == "bc":
        return float(sum(example.weights.sum() for example in examples))
    return float(sum(len(example.row.positions) for example in examples))
