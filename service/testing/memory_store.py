"""A store in memory, for tests of the packages that use a store. It does not make anything durable."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from service.filters import By, EpisodeFilter, as_text, labels_of, metadata_of, unix_seconds
from service.store.base import (
    EVERY,
    KEPT_MOVES,
    NEWEST_FIRST,
    OLDEST_FIRST,
    Commit,
    EpisodeExists,
    EpisodeGone,
    Ordering,
    Outcome,
    OutcomePage,
    Place,
    StepSample,
    StepTaken,
)
from service.trajectory import Catalog, Feedback, Step, StoredEpisode, StoredKey, StoredVersion


class MemoryStore:
    """Implements `Store` with dictionaries. A fork shares the `Step` objects of its parent, which never change."""

    def __init__(self) -> None:
        self._episodes: dict[str, StoredEpisode] = {}
        self._steps: dict[str, list[Step]] = {}
        self._feedback: dict[str, list[Feedback]] = {}
        self._versions: dict[tuple[str, str], StoredVersion] = {}
        self._moves: dict[str, list[str]] = {}
        self._default_policy: str | None = None
        self._keys: dict[str, StoredKey] = {}
        self._deleted_at: dict[str, float] = {}

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def create(self, record: StoredEpisode) -> None:
        if record.config.episode_id in self._episodes:
            raise EpisodeExists
        self._episodes[record.config.episode_id] = record
        self._steps[record.config.episode_id] = []
        self._feedback[record.config.episode_id] = []

    async def fork(self, records: Sequence[StoredEpisode]) -> None:
        if any(record.config.episode_id in self._episodes for record in records):
            raise EpisodeExists
        for record in records:
            assert record.config.parent is not None
            parent_id, at_step = record.config.parent
            self._check_alive(parent_id)
            await self.create(record)
            self._steps[record.config.episode_id] = self._steps[parent_id][:at_step]

    async def episode(self, episode_id: str) -> StoredEpisode | None:
        return self._episodes.get(episode_id)

    async def episodes(
        self,
        *,
        limit: int,
        before: Place | None,
        tenant: str | None = None,
        where: EpisodeFilter = EVERY,
        ordering: Ordering = NEWEST_FIRST,
    ) -> list[StoredEpisode]:
        kept = [row for row in self._episodes.values() if not row.deleted and tenant in (None, row.config.tenant)]
        rated = ordering.sort == "rating"
        rows = [replace(row, rating=self._rating(row) if rated else None) for row in kept if _matches(row, where)]
        rows.sort(key=ordering.place, reverse=ordering.order == "desc")
        following = [row for row in rows if before is None or _follows(ordering.place(row), before, ordering)]
        return following[:limit]

    async def outcomes(
        self, *, limit: int, after: Place | None, tenant: str, where: EpisodeFilter = EVERY, by: By
    ) -> OutcomePage:
        rows = await self.episodes(limit=limit, before=after, tenant=tenant, where=where, ordering=OLDEST_FIRST)
        names = [row.config.episode_id for row in rows]
        whole = {name: [one for one in self._feedback[name] if one.step is None] for name in names}
        return OutcomePage(
            [self._outcome(row, by) for row in rows],
            {row.config.episode_id: sorted({*row.config.request.get("tags", ())}) for row in rows if by == "tag"},
            {name: [(one.rater, one.rating) for one in given] for name, given in whole.items() if given},
        )

    def _outcome(self, row: StoredEpisode, by: By) -> Outcome:
        config, state, labels = row.config, row.state, labels_of(row.config.request)
        own = {name: getattr(state, name) for name in Outcome._fields if hasattr(state, name)}
        return Outcome(
            **own,
            episode_id=config.episode_id,
            created_at=config.created_at,
            parent_id=config.parent and config.parent[0],
            value=config.policy_version if by == "policy_version" else labels.get(by),
            env=labels["env"],
            seed=labels["seed"],
            policy_version=config.policy_version,
            root=self._root(row),
        )

    def _root(self, row: StoredEpisode) -> str:
        first = next(iter(self._steps[row.config.episode_id]), None)
        return first.episode_id if first and row.config.parent else row.config.episode_id

    async def step_samples(self, episode_ids: Sequence[str], num_steps: int) -> list[StepSample]:
        own = [(name, step) for name in episode_ids for step in self._steps.get(name, ()) if step.episode_id == name]
        kept = [(name, step) for name, step in own if step.index < num_steps and not step.closing]
        return [StepSample(name, step.seconds, step.temperature) for name, step in kept]

    async def commit(self, commit: Commit) -> None:
        record = self._episodes.get(commit.step.episode_id)
        rows = self._steps.get(commit.step.episode_id, [])
        if record is None or record.deleted or record.state.status != "active" or len(rows) != commit.step.index:
            raise StepTaken
        if commit.opened_at not in (None, record.config.created_at):
            raise StepTaken
        rows.append(commit.step)
        self._episodes[commit.step.episode_id] = replace(record, state=commit.state)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        rows = self._steps.get(episode_id, [])
        return list(rows) if index is None else rows[index : index + 1]

    async def trajectory(
        self, episode_id: str, first: int = 0, last: int | None = None
    ) -> tuple[StoredEpisode, list[Step]] | None:
        record = self._episodes.get(episode_id)
        end = None if last is None else last + 1
        return None if record is None else (record, self._steps[episode_id][first:end])

    async def next_expiry(self) -> float | None:
        return min((at for row in self._episodes.values() if (at := row.state.expires_at) is not None), default=None)

    async def expired(self, now: float, limit: int) -> list[str]:
        due = [(row.state.expires_at, name) for name, row in self._episodes.items() if row.state.expires_at is not None]
        return [name for at, name in sorted(due) if at <= now][:limit]

    async def add_feedback(self, feedback: Feedback) -> Feedback:
        self._check_alive(feedback.episode_id)
        ratings = self._feedback[feedback.episode_id]
        for earlier in ratings:
            if feedback.idempotency_key is not None and earlier.idempotency_key == feedback.idempotency_key:
                return earlier
        if feedback.rater is not None:
            ratings[:] = [old for old in ratings if (old.step, old.rater) != (feedback.step, feedback.rater)]
        ratings.append(feedback)
        return feedback

    def _check_alive(self, episode_id: str) -> None:
        record = self._episodes.get(episode_id)
        if record is None or record.deleted:
            raise EpisodeGone

    async def feedback(self, episode_id: str) -> list[Feedback]:
        return list(self._feedback.get(episode_id, ()))

    async def put_version(self, version: StoredVersion, *, move_alias: bool) -> StoredVersion:
        key = version.name, version.digest
        lineage = {name: getattr(version, name) for name in ("parent", "round", "evaluation")}
        given = {name: value for name, value in lineage.items() if value is not None}
        self._versions[key] = replace(self._versions.get(key, version), **given)
        history = self._moves.setdefault(version.name, []) if move_alias else [version.digest]
        if history[-1:] != [version.digest]:
            history.append(version.digest)
            del history[:-KEPT_MOVES]
        return self._versions[key]

    async def roll_back(self, name: str) -> StoredVersion | None:
        history = self._moves.get(name, [])
        if len(history) < 2:
            return None
        history.pop()
        return self._versions[name, history[-1]]

    async def delete_alias(self, name: str) -> bool:
        return self._moves.pop(name, None) is not None

    async def set_default_policy(self, policy: str | None) -> None:
        self._default_policy = policy

    async def remove_unused_versions(self, keep: Sequence[str] = ()) -> list[StoredVersion]:
        configs = [record.config for record in self._episodes.values() if record.state.status == "active"]
        used = {config.policy_digest or config.policy_version for config in configs}
        pointed = {(name, digest) for name, history in self._moves.items() for digest in history}
        named = [*keep, *filter(None, [self._default_policy])]
        unused = [
            version
            for key, version in self._versions.items()
            if key not in pointed
            and not used & {version.digest, version.version}
            and not any(version.has_reference(name) for name in named)
        ]
        for version in unused:
            del self._versions[version.name, version.digest]
        return unused

    async def catalog(self) -> Catalog:
        versions = sorted(self._versions.values(), key=lambda one: (one.name, one.loaded_at, one.digest))
        aliases = {name: history[-1] for name, history in self._moves.items()}
        previous = {name: history[-2] for name, history in self._moves.items() if len(history) > 1}
        return Catalog(tuple(versions), aliases, previous, self._default_policy)

    async def catalog_marks(self) -> object:
        catalog = await self.catalog()
        return catalog.aliases, sorted(self._versions), catalog.default

    async def num_active(self, tenant: str | None = None) -> int:
        active = (record for record in self._episodes.values() if record.state.status == "active")
        return sum(tenant in (None, record.config.tenant) for record in active)

    async def add_key(self, key: StoredKey) -> None:
        self._keys[key.key_id] = key

    async def revoke_key(self, key_id: str, at: float) -> bool:
        key = self._keys.get(key_id)
        if key is None or key.revoked_at is not None:
            return False
        self._keys[key_id] = replace(key, revoked_at=at)
        return True

    async def keys(self) -> list[StoredKey]:
        return list(self._keys.values())

    async def delete(self, episode_id: str) -> bool:
        record = self._episodes.get(episode_id)
        if record is None or record.deleted:
            return False
        state = replace(record.state, status="ended", expires_at=None)
        self._episodes[episode_id] = replace(
            record, config=replace(record.config, request={}), state=state, deleted=True
        )
        self._steps[episode_id] = []
        self._feedback[episode_id] = []
        self._deleted_at[episode_id] = time.time()
        return True

    async def delete_ended(self, ended_before: float, limit: int) -> list[str]:
        old = [
            name
            for name, row in self._episodes.items()
            if not row.deleted and row.state.ended_at is not None and row.state.ended_at < ended_before
        ]
        for name in old[:limit]:
            await self.delete(name)
        return old[:limit]

    async def remove_tombstones(self, deleted_before: float, limit: int) -> int:
        old = [name for name, at in self._deleted_at.items() if at < deleted_before][:limit]
        for name in old:
            del self._episodes[name], self._deleted_at[name]
        return len(old)

    def _rating(self, stored: StoredEpisode) -> float | None:
        ratings = [feedback.rating for feedback in self._feedback[stored.config.episode_id]]
        return sum(ratings) / len(ratings) if ratings else None


def _follows(place: Place, before: Place, ordering: Ordering) -> bool:
    return place < before if ordering.order == "desc" else place > before


def _matches(stored: StoredEpisode, where: EpisodeFilter) -> bool:
    return all(_has(stored, name, value) for name, value in where.items())


def _has(stored: StoredEpisode, name: str, value: Any) -> bool:
    request = stored.config.request
    match name:
        case "status":
            return stored.state.status == value
        case "success":
            return stored.state.success is value
        case "since":
            return stored.config.created_at >= unix_seconds(value)
        case "until":
            return stored.config.created_at < unix_seconds(value)
        case "tag":
            return value in request.get("tags", ())
        case "metadata":
            found = metadata_of(request)
            return all(found.get(key) == as_text(wanted) for key, wanted in value.items())
        case _:
            label = labels_of(request)[name]
            return label in value if isinstance(value, tuple) else label == value
