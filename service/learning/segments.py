"""A segment of the format `tokens` as arrays: which tokens can be trained, and what each was drawn among."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from service.learning import TrainingRefused
from service.learning.schema import check_segment

Integers = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

Json = Mapping[str, Any]


class Kind(IntEnum):
    """Which distribution a token was drawn from.

    IDS: the listed ids. ALL: the whole vocabulary. FILTERED: a part of the vocabulary that was not kept. RECORDED: the
    token was not drawn; it belongs to an action that somebody else chose.
    """

    IDS = 0
    ALL = 1
    FILTERED = 2
    RECORDED = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A segment: its tokens, and which of them can be trained. The arrays from `positions` on have an entry for each
    token that can be trained.

    token_ids: all tokens.
    positions: places in `token_ids`, ascending. Never 0, because nothing predicts the first token.
    kinds: see `Kind`.
    logprobs: the stored log-probabilities; 0 for recorded tokens.
    steps: index of the step; -1 if the export does not say.
    support_ids: the supports of all tokens of kind IDS, one after the other.
    support_sizes: number of ids of each token's support; 0 for other kinds.
    temperature: the effective temperature of the tokens that were drawn.
    versions: policy versions of the steps that can be trained.
    encoder_ids: what the encoder received; None for a decoder-only model.
    """

    token_ids: Integers
    positions: Integers
    kinds: Integers
    logprobs: Floats
    steps: Integers
    support_ids: Integers
    support_sizes: Integers
    temperature: float
    versions: tuple[str, ...]
    encoder_ids: Integers | None = None

    @property
    def length(self) -> int:
        """Number of tokens that the model receives."""
        return len(self.token_ids) + (0 if self.encoder_ids is None else len(self.encoder_ids))

    @property
    def prompt(self) -> bytes:
        """Identifies everything that precedes the first token that can be trained."""
        before = self.token_ids[: self.positions[0]].tobytes()
        return before if self.encoder_ids is None else self.encoder_ids.tobytes() + before

    def take(self, kept: Flags) -> "Row":
        """Returns the row with only these of its trained tokens."""
        return Row(
            self.token_ids,
            self.positions[kept],
            self.kinds[kept],
            self.logprobs[kept],
            self.steps[kept],
            self.support_ids[np.repeat(kept, self.support_sizes)],
            self.support_sizes[kept],
            self.temperature,
            self.versions,
            self.encoder_ids,
        )


def parse(segment: Json, first: int, place: str) -> Row | None:
    """Returns a segment; None if it has no token that can be trained. `first`: the episode's own first step."""
    check_segment(segment, place)
    try:
        return _parsed(segment, first, place)
    except ValueError as error:
        raise TrainingRefused(f"{place} cannot be used: {error}") from error


def _parsed(segment: Json, first: int, place: str) -> Row | None:
    token_ids = np.asarray(segment["token_ids"], np.int32)
    drawn = np.asarray(segment["loss_mask"], np.bool_)
    logprobs = np.asarray(segment["logprobs"], np.float32)
    recorded = np.asarray(segment.get("recorded_mask", np.zeros(len(token_ids))), np.bool_)
    if not token_ids.shape == drawn.shape == logprobs.shape == recorded.shape:
        raise ValueError("token_ids, loss_mask, logprobs and recorded_mask differ in length")
    positions = np.flatnonzero(drawn | recorded).astype(np.int32)
    steps = _steps(segment, positions, first, place)
    own = (positions > 0) & ((steps < 0) | (steps >= first))
    positions, steps = positions[own], steps[own]
    if not positions.size or (first and max(segment["steps"]) < first):
        return None
    values = np.where(drawn[positions], logprobs[positions], 0.0).astype(np.float32)
    if not np.isfinite(values).all() or values.max() > 1e-3:
        raise ValueError("a log-probability is not a number, or above 0")
    kinds, ids, sizes = _supports(segment.get("support"), token_ids, positions, drawn)
    temperature = float(segment.get("temperature", 1.0))
    versions = _versions(segment, steps, first)
    given = segment.get("encoder_token_ids")
    encoder_ids = None if given is None else np.asarray(given, np.int32)
    return Row(token_ids, positions, kinds, values, steps, ids, sizes, temperature, versions, encoder_ids)


def _steps(segment: Json, positions: Integers, first: int, place: str) -> Integers:
    """Returns the step of each position. Without `step_starts` it is unknown (-1), which a fork cannot do with."""
    indices: Sequence[int] = segment["steps"]
    starts: Any = segment.get("step_starts")
    if starts is not None:
        if len(starts) != len(indices) or any(a > b for a, b in pairwise(starts)):
            raise ValueError("step_starts does not fit steps")
        found = np.searchsorted(np.asarray(starts, np.int64), positions, side="right") - 1
        if found.size and found.min() < 0:
            raise ValueError("a token before the first step has the mask 1")
        return np.asarray(indices, np.int32)[found]
    if first and min(indices) < first <= max(indices):
        raise TrainingRefused(
            f"{place}: the episode is a fork, and the segment does not say which tokens belong to its parent "
            "(`step_starts`). Export it again with the current version."
        )
    return np.full(len(positions), -1, np.int32)


def _versions(segment: Json, steps: Integers, first: int) -> tuple[str, ...]:
    trained = set(steps.tolist())
    of_steps = zip(segment["steps"], segment["policy_versions"], strict=True)
    return tuple(
        sorted({str(version) for step, version in of_steps if step in trained or (-1 in trained and step >= first)})
    )


def _supports(
    supports: Any, token_ids: Integers, positions: Integers, drawn: Flags
) -> tuple[Integers, Integers, Integers]:
    """Returns the kind of each token, and the ids of all supports with their sizes.

    An export of an older version has no supports. Its tokens count as filtered, because nothing is known about them.
    """
    if supports and len(supports) != len(token_ids):
        raise ValueError("support and token_ids differ in length")
    kinds, ids, sizes = np.empty(len(positions), np.int32), list[int](), np.zeros(len(positions), np.int32)
    for place, position in enumerate(positions.tolist()):
        support: Json = (supports and supports[position]) or {"kind": "filtered"}
        kinds[place] = Kind[str(support["kind"]).upper()] if drawn[position] else Kind.RECORDED
        if kinds[place] == Kind.IDS:
            allowed: list[int] = support.get("ids", [])
            if token_ids[position] not in allowed:
                raise ValueError(f"token {position} ({token_ids[position]}) is not in its own support")
            if len(set(allowed)) != len(allowed):
                raise ValueError(f"the support of token {position} has an id twice")
            ids += allowed
            sizes[place] = len(allowed)
    return kinds, np.asarray(ids, np.int32), sizes
