"""Checks that data, base model and adapter belong together."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.engine.weights import weights_version
from service.filters import EpisodeFilter
from service.learning import TrainingRefused
from service.learning.adapter import read_files, version_of
from service.learning.options import Options
from service.learning.segments import Row
from service.learning.trajectories import Episode
from service.learning.units import Selection


@dataclass(frozen=True, slots=True)
class Versions:
    """The `policy_version` of the base model, and of the policy that training starts from."""

    base: str
    initial: str


def versions(model: Any, path: str, digests: Path | None, adapter: Path | None) -> Versions:
    """Computes the versions as the service does. Arguments are those of `run.Base`. Raises TrainingRefused."""
    base = weights_version(Path(path), digests) or getattr(model.config, "_commit_hash", None) or "unknown"
    base = base[:12]
    return Versions(base, version_of(read_files(adapter), base) if adapter else base)


def check_versions(chosen: Selection, episodes: Sequence[Episode], found: Versions, options: Options) -> None:
    """Adds a warning if another policy than the initial one acted, or raises TrainingRefused."""
    counts = Counter(version for row in chosen.rows for version in row.versions if version != found.initial)
    if not counts:
        return
    names = ", ".join(sorted({episode.policy for episode in episodes})[:5])
    others = ", ".join(f"{version} ({count} segments)" for version, count in counts.most_common(5))
    text = f"the policy versions that acted are {others}, of: {names}. Training starts from version {found.initial}"
    if options.any_version:
        chosen.warnings.append(text)
        return
    raise TrainingRefused(
        f"the data is of another base model or policy version: {text}. Name the policy that acted with --model and "
        "--init-adapter, or accept the difference with --any-version."
    )


def check_vocabulary(model: Any, rows: Sequence[Row]) -> None:
    """Raises TrainingRefused if a row is of another kind of model, or if a token or a length is impossible for it."""
    if any((row.encoder_ids is not None) != bool(model.config.is_encoder_decoder) for row in rows):
        kind = "an encoder-decoder" if model.config.is_encoder_decoder else "a decoder-only"
        raise TrainingRefused(f"the base model is {kind} model, but episodes in the data are of the other kind")
    size = model.get_input_embeddings().num_embeddings
    inputs = [row.token_ids if row.encoder_ids is None else row.encoder_ids for row in rows]
    used = (ids for row, given in zip(rows, inputs, strict=True) for ids in (row.token_ids, row.support_ids, given))
    highest = max(int(ids.max()) for ids in used if ids.size)
    if highest >= size:
        raise TrainingRefused(
            f"the data has the token id {highest}, but the base model has only {size} tokens: the episodes are of "
            "another model or tokenizer"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, inputs))
    if limit is not None and longest > limit:
        raise TrainingRefused(
            f"a segment has {longest} tokens, but the context of the base model is {limit}: the episodes are of "
            "another model"
        )


def fingerprint(options: Options, where: EpisodeFilter, digest: str, found: Versions) -> dict[str, Any]:
    """What must be the same when a run continues."""
    filters = {name: str(value) for name, value in where.items()}
    return {**options.as_json(), "filters": filters, "data": digest, "base": found.base, "initial": found.initial}


def check_fingerprint(path: Path, wanted: Mapping[str, Any]) -> None:
    """Raises TrainingRefused if the unfinished run was started with something else."""
    try:
        started = dict[str, Any](json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingRefused(f"{path} is damaged, so the run cannot continue. Remove {path.parent}.") from error
    changed = [
        f"{name} ({started.get(name)!r}, now {value!r})" for name, value in wanted.items() if started.get(name) != value
    ]
    if changed:
        raise TrainingRefused(
            f"the run in {path.parent} was started with something else: {', '.join(changed)}. Repeat the options and "
            "the data that it was started with, or remove the folder."
        )
