"""Owns the seam to the store: the Store protocol, and what a commit can be refused for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from service.filters import EpisodeFilter
from service.trajectory import EpisodeState, Feedback, Step, StoredEpisode, StoredKey, StoredPolicy


class StepTaken(Exception):
    """The episode already has a step with this index, or has ended: somebody else committed it."""


class EpisodeExists(Exception):
    """There is an episode with this id already, a tombstone perhaps."""


class EpisodeGone(Exception):
    """The episode to fork or to rate was deleted."""


class StoreUnavailable(Exception):
    """The store cannot be reached or cannot write. Whether a change was written is unknown until it is read again."""

    code: ClassVar = "store_unavailable"


class StoreRefused(Exception):
    """The store cannot be served at all, and time does not mend it; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One act's change: the step's row, and the episode's state after it."""

    step: Step
    state: EpisodeState


Change = StoredEpisode | Commit
"""What one transaction may hold many of: new episodes and acts."""


EVERY = EpisodeFilter()


class Store(Protocol):
    """Every method raises StoreUnavailable when the store cannot be used."""

    async def open(self) -> None:
        """Brings the schema up to date and connects. Raises StoreRefused."""
        ...

    async def close(self) -> None: ...

    async def create(self, record: StoredEpisode) -> None:
        """Adds an episode. Raises EpisodeExists."""
        ...

    async def episode(self, episode_id: str) -> StoredEpisode | None:
        """The episode, a tombstone if it was deleted, or None."""
        ...

    async def fork(self, records: Sequence[StoredEpisode]) -> None:
        """Adds forks of one episode, all or none: they share its rows before their `config.parent` step. Raises
        EpisodeExists, EpisodeGone."""
        ...

    async def episodes(
        self,
        *,
        limit: int,
        before: tuple[float, str] | None,
        tenant: str | None = None,
        where: EpisodeFilter = EVERY,
    ) -> list[StoredEpisode]:
        """Newest first, those created before (created_at, episode_id) `before`; of one tenant or of all; no
        tombstones."""
        ...

    async def commit(self, commit: Commit) -> None:
        """Durable once it returns. Raises StepTaken unless the episode is active and has exactly step.index steps."""
        ...

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        """The episode's rows in order, its ancestors' and the closing one included; or the one with this index."""
        ...

    async def trajectory(self, episode_id: str) -> tuple[StoredEpisode, list[Step]] | None:
        """The episode and its rows, as they are at one moment."""
        ...

    async def next_expiry(self) -> float | None:
        """When the next active episode expires, if any does."""
        ...

    async def expired(self, now: float, limit: int) -> list[str]:
        """Active episodes that expired by `now`, the longest expired first."""
        ...

    async def add_feedback(self, feedback: Feedback) -> None:
        """Keeps a rating; in place of the one that its rater, if named, gave for the same step. Raises EpisodeGone."""
        ...

    async def feedback(self, episode_id: str) -> list[Feedback]:
        """The episode's ratings, oldest first."""
        ...

    async def put_policy(self, policy: StoredPolicy) -> None:
        """Keeps which adapter goes by this name."""
        ...

    async def delete_policy(self, name: str) -> None: ...

    async def policies(self) -> list[StoredPolicy]:
        """The adapters that are kept, by name."""
        ...

    async def num_active(self, tenant: str | None = None) -> int:
        """How many episodes have not ended, of all tenants or one."""
        ...

    async def add_key(self, key: StoredKey) -> None: ...

    async def revoke_key(self, key_id: str, at: float) -> bool:
        """False if there is no such key, or it is revoked already."""
        ...

    async def keys(self) -> list[StoredKey]:
        """All of them, the revoked ones included, in the order in which they were made."""
        ...

    async def delete(self, episode_id: str) -> bool:
        """Leaves a tombstone, and drops the steps once no fork reads them; False if there was nothing to delete."""
        ...
