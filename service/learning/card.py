"""The card beside an adapter's weights: what it was trained from, how, and what came out."""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.filters import EpisodeFilter
from service.learning import TrainingRefused
from service.learning.checks import Versions
from service.learning.options import Options
from service.learning.rehearsal import Rehearsal
from service.learning.trainer import Figures
from service.learning.trajectories import Data
from service.learning.units import Selection

_PACKAGES = ("episodic", "peft", "torch", "transformers")


def make_card(
    *,
    options: Options,
    base_name: str,
    versions: Versions,
    policy_version: str,
    data: Data,
    where: EpisodeFilter,
    chosen: Selection,
    rehearsal: Rehearsal,
    metrics: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """Returns the card as JSON."""
    return {
        "policy_version": policy_version,
        "base": {"model": base_name, "policy_version": versions.base},
        "initial_policy_version": versions.initial,
        "method": options.method,
        "options": options.as_json(),
        "data": {
            "digest": f"sha256:{data.digest}",
            "filters": as_text(where),
            "trajectories_read": data.num_read,
            **chosen.as_json(),
        },
        "rehearsal": rehearsal.as_json(),
        "warnings": chosen.warnings,
        "metrics": metrics,
        "device": device,
        "packages": {name: _version(name) for name in _PACKAGES},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def as_text(where: EpisodeFilter) -> dict[str, str]:
    return {name: str(value) for name, value in where.items()}


def read_card(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the card in a file, and what the adapter was trained with: the options, and the entries `base model`,
    `base`, `initial`, `filters`, `data` and `rehearsal`. Raises TrainingRefused if the card is damaged.
    """
    try:
        card: dict[str, Any] = json.loads(path.read_bytes())
        return card, {
            **card["options"],
            "base model": card["base"]["model"],
            "base": card["base"]["policy_version"],
            "initial": card["initial_policy_version"],
            "filters": card["data"]["filters"],
            "data": card["data"]["digest"],
            "rehearsal": card.get("rehearsal"),
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TrainingRefused(f"{path} is damaged ({error!r}). Remove {path.parent} to train again.") from error


def check_same(out: Path, trained: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises TrainingRefused if the complete adapter in `out` was trained with something else."""
    changed = [
        f"{name} ({trained[name]!r}, now {value!r})"
        for name, value in wanted.items()
        if name in trained and trained[name] != value
    ]
    if changed:
        raise TrainingRefused(
            f"{out} is complete, but was trained with something else: {', '.join(changed)}. Choose another folder for "
            "--out."
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def rounded(figures: Figures) -> dict[str, float | None]:
    """Figures for JSON: rounded, and None in place of infinity and NaN."""
    return {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in figures.items()}


def summary(data: Data, chosen: Selection) -> str:
    """One line about the data."""
    counts = chosen.as_json()
    kinds = ", ".join(f"{share:.1%} {kind}" for kind, share in chosen.kinds().items())
    excluded = "".join(f"; {count} {reason}" for reason, count in chosen.excluded.most_common())
    mean = "" if chosen.mean_return is None else f", mean return {chosen.mean_return:.3f}"
    return (
        f"{chosen.num_used} of {len(data.episodes)} episodes{mean}: {counts['trained_tokens']} trained tokens of "
        f"{counts['tokens']} in {counts['segments']} segments ({kinds}){excluded}"
    )
