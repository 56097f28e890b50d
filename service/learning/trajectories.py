"""Reads an export (`format=tokens`, one trajectory per line), checks it, and keeps what training needs in arrays."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from service.files import complete_file
from service.filters import LABELS, NO_RESULT, EpisodeFilter, as_text, labels_of, metadata_of, unix_seconds
from service.learning import TrainingInterrupted, TrainingRefused
from service.learning.schema import check_trajectory
from service.learning.segments import Json, Row, parse


@dataclass(frozen=True, slots=True)
class Episode:
    """A trajectory.

    situation: its environment and seed, if both are known.
    parent: the episode that it was forked from, and the index of its own first step.
    stop_reason: why it ended.
    episode_return: None if nothing was scored.
    rewards: for each step that does not belong to an ancestor; 0 where there was none. None if the export has none.
    ratings: mean rating of each rated step, and under None that of the whole episode.
    rows: without the steps that belong to an ancestor.
    """

    episode_id: str
    policy: str
    group: str | None
    situation: tuple[str, str] | None
    parent: tuple[str, int] | None
    stop_reason: str | None
    episode_return: float | None
    success: bool | None
    is_greedy: bool
    rewards: Sequence[float] | None
    ratings: Mapping[int | None, float]
    rows: tuple[Row, ...]

    @property
    def has_result(self) -> bool:
        return self.stop_reason not in NO_RESULT


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
    with complete_file(path) as file:
        for document in documents:
            file.write(json.dumps(document).encode() + b"\n")
            if should_stop():
                raise TrainingInterrupted


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
        filters = {"status": "ended", **wanted}
        raise TrainingRefused(f"none of the {num_read} trajectories in {path} matches the filters {filters}")
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
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise TrainingRefused(
                f"{place}: the line is cut off, so the file is incomplete. Export it again."
            ) from error
        raise TrainingRefused(f"{place} is not JSON: {error}") from error
    if not _is_object(document) or not _is_object(document.get("episode")):
        raise TrainingRefused(f"{place} is not a trajectory: it has no `episode`")
    if not isinstance(document.get("segments"), list):
        raise TrainingRefused(f"{place} has no `segments`. Export with --format tokens.")
    check_trajectory(document, place)
    return document


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _episode(document: Json, place: str) -> Episode:
    resource: Json = document["episode"]
    parent: Any = resource.get("parent")
    labels = labels_of(resource)
    env, seed = labels["env"], labels["seed"]
    first: int = parent["step"] if parent else 0
    rows = [parse(segment, first, f"{place}, segment {index}") for index, segment in enumerate(document["segments"])]
    sampling: Json = resource.get("sampling") or {}
    return Episode(
        episode_id=str(resource.get("episode_id", place)),
        policy=str(resource.get("policy", "unknown")),
        group=resource.get("group"),
        situation=None if env is None or seed is None else (env, seed),
        parent=(str(parent["episode_id"]), first) if parent else None,
        stop_reason=resource.get("stop_reason"),
        episode_return=resource.get("episode_return") if _is_scored(document) else None,
        success=resource.get("success"),
        is_greedy=sampling.get("temperature") == 0,
        rewards=_rewards(document["segments"], first, place),
        ratings=_ratings(document.get("feedback") or ()),
        rows=tuple(row for row in rows if row is not None),
    )


def _is_scored(document: Json) -> bool:
    """The service gives an episode without any reward the return 0, although nobody scored it."""
    rewards = [segment.get("rewards") for segment in document["segments"]]
    is_without = None not in rewards and all(reward is None for of_segment in rewards for reward in of_segment)
    return document["episode"].get("episode_return") != 0 or not is_without


def _rewards(segments: Iterable[Json], first: int, place: str) -> list[float] | None:
    """An export of an older version has no rewards."""
    steps: list[int] = []
    found: list[float] = []
    for segment in segments:
        rewards: Any = segment.get("rewards")
        if rewards is None:
            return None
        if len(rewards) != len(segment["steps"]):
            raise TrainingRefused(f"{place}: `rewards` does not fit `steps`")
        steps += segment["steps"]
        found += [reward or 0.0 for reward in rewards]
    if steps != list(range(len(steps))):
        raise TrainingRefused(f"{place}: the `steps` of all segments together are not 0, 1, 2, and so on")
    return found[first:]


def _ratings(feedback: Iterable[Json]) -> dict[int | None, float]:
    found: dict[int | None, list[float]] = {}
    for item in feedback:
        found.setdefault(item.get("step"), []).append(item["rating"])
    return {step: fmean(values) for step, values in found.items()}
