"""Reads an export (`format=tokens`, one trajectory per line), checks it, and keeps what training needs in arrays."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from service.filters import LABELS, EpisodeFilter, as_text, labels_of, metadata_of, unix_seconds
from service.learning import TrainingInterrupted, TrainingRefused

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
        )


@dataclass(frozen=True, slots=True)
class Episode:
    """A trajectory.

    situation: its environment and seed, if both are known.
    parent: the episode that it was forked from, and the index of its own first step.
    episode_return: None if nothing was scored.
    ratings: mean rating of each rated step, and under None that of the whole episode.
    rows: without the steps that belong to an ancestor.
    """

    episode_id: str
    policy: str
    group: str | None
    situation: tuple[str, str] | None
    parent: tuple[str, int] | None
    episode_return: float | None
    success: bool | None
    is_greedy: bool
    ratings: Mapping[int | None, float]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Data:
    """The trajectories that match the filters.

    digest: SHA-256 of their lines.
    num_read: number of trajectories in the file.
    """

    episodes: tuple[Episode, ...]
    digest: str
    num_read: int


def never() -> bool:
    return False


def freeze(documents: Iterable[Json], path: Path, should_stop: Callable[[], bool] = never) -> None:
    """Writes an export to a file, which appears only when it is complete.

    Raises TrainingInterrupted, and whatever `documents` and the file raise.
    """
    partial = path.with_name(f"{path.name}.incomplete")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps(document) + "\n")
                if should_stop():
                    raise TrainingInterrupted
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, where: EpisodeFilter | None = None, should_stop: Callable[[], bool] = never) -> Data:
    """Reads the trajectories that match the filters; without a filter for `status`, those that have ended.

    Raises TrainingRefused if the file cannot be used, and TrainingInterrupted.
    """
    wanted = where or EpisodeFilter()
    found: list[Episode] = []
    digest = hashlib.sha256()
    num_read = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if should_stop():
                    raise TrainingInterrupted
                place = f"{path}, line {number}"
                document = _document(line, place)
                num_read += 1
                if matches(document["episode"], wanted):
                    found.append(_episode(document, place))
                    digest.update(line)
    except OSError as error:
        raise TrainingRefused(f"{path} cannot be read: {error.strerror}") from error
    if not num_read:
        raise TrainingRefused(
            f"{path} is empty: it contains no trajectory. Export ended episodes with --format tokens."
        )
    if not found:
        raise TrainingRefused(f"none of the {num_read} trajectories in {path} matches the filters {dict(wanted)}")
    return Data(tuple(found), digest.hexdigest(), num_read)


def matches(resource: Json, where: EpisodeFilter) -> bool:
    """Whether an episode resource matches the filters, as GET /export defines them."""
    labels, metadata = labels_of(resource), metadata_of(resource)
    wanted = cast("dict[str, Any]", where)
    created = resource.get("created_at")
    entries = {key: as_text(value) for key, value in wanted.get("metadata", {}).items()}
    return (
        wanted.get("status", "ended") == resource.get("status", "ended")
        and ("tag" not in wanted or wanted["tag"] in (resource.get("tags") or ()))
        and ("success" not in wanted or wanted["success"] is resource.get("success"))
        and all(labels[name] == wanted[name] for name in LABELS if name in wanted)
        and all(metadata.get(key) == value for key, value in entries.items())
        and ("since" not in wanted or unix_seconds(created or 0.0) >= unix_seconds(wanted["since"]))
        and ("until" not in wanted or unix_seconds(created or 0.0) < unix_seconds(wanted["until"]))
    )


def _document(line: bytes, place: str) -> Json:
    try:
        document: Any = json.loads(line)
    except ValueError as error:
        if not line.endswith(b"\n"):
            raise TrainingRefused(
                f"{place}: the line is cut off, so the file is incomplete. Export it again."
            ) from error
        raise TrainingRefused(f"{place} is not JSON: {error}") from error
    if not _is_object(document) or not _is_object(document.get("episode")):
        raise TrainingRefused(f"{place} is not a trajectory: it has no `episode`")
    if not isinstance(document.get("segments"), list):
        raise TrainingRefused(f"{place} has no `segments`. Export with --format tokens.")
    return document


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _episode(document: Json, place: str) -> Episode:
    resource: Json = document["episode"]
    parent: Any = resource.get("parent")
    labels = labels_of(resource)
    env, seed = labels["env"], labels["seed"]
    first = int(parent["step"]) if parent else 0
    rows = [_row(segment, first, f"{place}, segment {index}") for index, segment in enumerate(document["segments"])]
    sampling: Json = resource.get("sampling") or {}
    return Episode(
        episode_id=str(resource.get("episode_id", place)),
        policy=str(resource.get("policy", "unknown")),
        group=resource.get("group"),
        situation=None if env is None or seed is None else (env, seed),
        parent=(str(parent["episode_id"]), first) if parent else None,
        episode_return=_return(resource.get("episode_return"), place),
        success=resource.get("success"),
        is_greedy=sampling.get("temperature") == 0,
        ratings=_ratings(document.get("feedback") or ()),
        rows=tuple(row for row in rows if row is not None),
    )


def _return(value: Any, place: str) -> float | None:
    """A missing return stays missing: an episode that nobody scored did not score 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TrainingRefused(f"{place}: `episode_return` is {value!r}, which is not a finite number")
    return float(value)


def _ratings(feedback: Iterable[Json]) -> dict[int | None, float]:
    found: dict[int | None, list[float]] = {}
    for item in feedback:
        found.setdefault(item.get("step"), []).append(float(item["rating"]))
    return {step: fmean(values) for step, values in found.items()}


def _row(segment: Json, first: int, place: str) -> Row | None:
    """Returns a segment; None if it has no token that can be trained. `first`: the episode's own first step."""
    if "encoder_token_ids" in segment:
        raise TrainingRefused(f"{place} is of an encoder-decoder model, which cannot be trained")
    try:
        return _parsed(segment, first, place)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TrainingRefused(f"{place} is not a segment of tokens: {type(error).__name__}: {error}") from error


def _parsed(segment: Json, first: int, place: str) -> Row | None:
    token_ids = np.asarray(segment["token_ids"], np.int32)
    drawn = np.asarray(segment["loss_mask"], np.bool_)
    logprobs = np.asarray(segment["logprobs"], np.float32)
    recorded = np.asarray(segment.get("recorded_mask", np.zeros(len(token_ids))), np.bool_)
    if not token_ids.shape == drawn.shape == logprobs.shape == recorded.shape:
        raise ValueError("token_ids, loss_mask, logprobs and recorded_mask differ in length")
    if token_ids.size and token_ids.min() < 0:
        raise ValueError(f"the token id {token_ids.min()} is negative")
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
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature is {temperature:g}")
    versions = _versions(segment, steps, first)
    return Row(token_ids, positions, kinds, values, steps, ids, sizes, temperature, versions)


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
    kinds, ids, sizes = np.empty(len(positions), np.int32), list[int](), np.zeros(len(positions), np.int32)
    for place, position in enumerate(positions.tolist()):
        support: Json = (supports and supports[position]) or {"kind": "filtered"}
        kinds[place] = Kind[str(support["kind"]).upper()] if drawn[position] else Kind.RECORDED
        if kinds[place] == Kind.IDS:
            allowed: list[int] = support["ids"]
            if token_ids[position] not in allowed:
                raise ValueError(f"token {position} ({token_ids[position]}) is not in its own support")
            ids += allowed
            sizes[place] = len(allowed)
    return kinds, np.asarray(ids, np.int32), sizes
