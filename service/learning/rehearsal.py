"""Rehearsal: episodes that are imitated along, so that training on a new task does not unlearn them.

Continual learning calls it experience replay (D. Rolnick et al., "Experience Replay for Continual Learning", 2019).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.filters import EpisodeFilter
from service.learning import NothingToLearn
from service.learning.segments import Kind, Row
from service.learning.trajectories import read


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Rows of drawn tokens, and the digest of their export; None without one."""

    rows: Sequence[Row] = ()
    digest: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(row.positions) for row in self.rows)

    def as_json(self) -> dict[str, Any] | None:
        if self.digest is None:
            return None
        return {"digest": f"sha256:{self.digest}", "segments": len(self.rows), "trained_tokens": self.num_tokens}


def read_rehearsal(path: Path | None, should_stop: Callable[[], bool]) -> Rehearsal:
    """Reads the export, if there is one. Raises TrainingRefused, and NothingToLearn if no token in it was drawn."""
    if path is None:
        return Rehearsal()
    data = read(path, EpisodeFilter(), should_stop)
    rows = [row.take(row.kinds != Kind.RECORDED) for episode in data.episodes for row in episode.rows]
    rows = [row for row in rows if len(row.positions)]
    if not rows:
        raise NothingToLearn(f"nothing to rehearse: the policy chose none of the actions in {path}")
    return Rehearsal(rows, data.digest)
