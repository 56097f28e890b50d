"""Owns the store in memory: the same promises but durability, for tests of what stands above the store."""

from dataclasses import replace

from service.store.base import Commit, EpisodeExists, StepTaken
from service.trajectory import EpisodeRecord, Status, Step


class MemoryStore:
    """Episodes in dictionaries; gone with the process."""

    def __init__(self) -> None:
        self._episodes: dict[str, EpisodeRecord] = {}
        self._steps: dict[str, list[Step]] = {}

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def create(self, record: EpisodeRecord) -> None:
        if record.config.episode_id in self._episodes:
            raise EpisodeExists
        self._episodes[record.config.episode_id] = record
        self._steps[record.config.episode_id] = []

    async def episode(self, episode_id: str) -> EpisodeRecord | None:
        return self._episodes.get(episode_id)

    async def episodes(
        self, *, limit: int, before: tuple[float, str] | None, status: Status | None
    ) -> list[EpisodeRecord]:
        rows = sorted(self._episodes.values(), key=_newest, reverse=True)
        rows = [row for row in rows if not row.deleted and (status is None or row.head.status == status)]
        return [row for row in rows if before is None or _newest(row) < before][:limit]

    async def commit(self, commit: Commit) -> None:
        record = self._episodes.get(commit.step.episode_id)
        rows = self._steps.get(commit.step.episode_id, [])
        if record is None or record.deleted or record.head.status != "active" or len(rows) != commit.step.index:
            raise StepTaken
        rows.append(commit.step)
        self._episodes[commit.step.episode_id] = replace(record, head=commit.head)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        rows = self._steps.get(episode_id, [])
        return list(rows) if index is None else rows[index : index + 1]

    async def num_active(self) -> int:
        return sum(record.head.status == "active" for record in self._episodes.values())

    async def delete(self, episode_id: str) -> bool:
        record = self._episodes.get(episode_id)
        if record is None or record.deleted:
            return False
        head = replace(record.head, status="ended")
        self._episodes[episode_id] = replace(record, config=replace(record.config, request={}), head=head, deleted=True)
        self._steps[episode_id] = []
        return True


def _newest(record: EpisodeRecord) -> tuple[float, str]:
    return record.config.created_at, record.config.episode_id
