"""The SQL store: implements `Store` with statements that SQLite and PostgreSQL share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    and_,
    delete,
    exists,
    false,
    func,
    insert,
    make_url,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql import ColumnElement

from service.filters import EpisodeFilter
from service.store.base import (
    EVERY,
    Change,
    Commit,
    EpisodeExists,
    EpisodeGone,
    StepTaken,
    StoreUnavailable,
)
from service.store.changes import insert_episodes, locked, write_changes
from service.store.connections import Connections, Patience, reason
from service.store.group_commit import GroupCommit, OnCommit
from service.store.schema import (
    LABEL_COLUMNS,
    ancestors,
    episode_record,
    episode_row,
    episodes,
    feedback_row,
    feedback_value,
    key_record,
    key_row,
    keys,
    policies,
    policy_row,
    ratings,
    step_value,
    steps,
    storable,
    tag_rows,
    tags,
)
from service.store.sqlite import SQLiteConnections
from service.trajectory import Feedback, Step, StoredEpisode, StoredKey, StoredPolicy

_T = TypeVar("_T")


def _ignore(num_acts: int, seconds: float) -> None:
    pass


def _connections(url: URL, patience: Patience) -> Connections:
    if url.get_backend_name() == "sqlite":
        return SQLiteConnections(url, patience)
    from service.store.postgresql import PostgreSQLConnections  # imports asyncpg only if it is used

    return PostgreSQLConnections(url, patience)


class SQLStore:
    """A store in a SQLite file or in a PostgreSQL database. The methods are described in `Store`.

    url: sqlite:///FILE or postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE.
    on_commit: called with (num_acts, seconds) after each commit.
    patience: timeouts.
    """

    def __init__(self, url: str, on_commit: OnCommit = _ignore, patience: Patience | None = None) -> None:
        self._connections = _connections(make_url(url), patience or Patience())
        self._read = self._connections.read
        self._group = GroupCommit(self._write_together, on_commit)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        await self._connections.open()
        self._group.start()

    async def migrate(self, revision: str) -> None:
        """Upgrades or downgrades the schema to a revision. The store must not be open. Raises StoreRefused."""
        try:
            await self._connections.open(revision)
        finally:
            await self._connections.close()

    async def close(self) -> None:
        await self._group.stop()
        await self._connections.close()

    async def create(self, record: StoredEpisode) -> None:
        await self._group.submit(record)

    async def episode(self, episode_id: str) -> StoredEpisode | None:
        return await self._read(lambda connection: _read_episode(connection, episode_id))

    async def fork(self, records: Sequence[StoredEpisode]) -> None:
        parent = records[0].config.parent
        assert parent is not None
        ids = [record.config.episode_id for record in records]
        opened = [(episode_row(record), tag_rows(record)) for record in records]

        def write(connection: Connection) -> None:
            insert_episodes(connection, opened)
            _lock_alive(connection, parent[0])
            inherited = _lineage(connection, *parent)
            rows = [
                {"episode_id": episode_id, "ancestor_id": ancestor, "num_steps": num_steps}
                for episode_id in ids
                for ancestor, num_steps in inherited
            ]
            if rows:
                connection.execute(insert(ancestors), rows)

        try:
            await self._connections.write(write)
        except IntegrityError as error:
            raise EpisodeExists from error

    async def episodes(
        self,
        *,
        limit: int,
        before: tuple[float, str] | None,
        tenant: str | None = None,
        where: EpisodeFilter = EVERY,
    ) -> list[StoredEpisode]:
        query = select(episodes).where(episodes.c.deleted_at.is_(None), *_conditions(tenant, where))
        if before is not None:
            query = query.where(_older(*before))
        query = query.order_by(episodes.c.created_at.desc(), episodes.c.episode_id.desc()).limit(limit)

        def read(connection: Connection) -> list[StoredEpisode]:
            return [episode_record(row) for row in connection.execute(query).mappings()]

        return await self._read(read)

    async def commit(self, commit: Commit) -> None:
        await self._group.submit(commit)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        return await self._read(lambda connection: _read_steps(connection, episode_id, index))

    async def trajectory(self, episode_id: str) -> tuple[StoredEpisode, list[Step]] | None:
        def read(connection: Connection) -> tuple[StoredEpisode, list[Step]] | None:
            record = _read_episode(connection, episode_id)
            return record and (record, _read_steps(connection, episode_id))

        return await self._read(read)

    async def next_expiry(self) -> float | None:
        query = select(func.min(episodes.c.expires_at))
        return await self._read(lambda connection: connection.execute(query).scalar())

    async def expired(self, now: float, limit: int) -> list[str]:
        query = select(episodes.c.episode_id).where(episodes.c.expires_at <= now)
        query = query.order_by(episodes.c.expires_at).limit(limit)
        return await self._read(lambda connection: list(connection.execute(query).scalars()))

    async def add_feedback(self, feedback: Feedback) -> None:
        row = feedback_row(feedback)
        same = [ratings.c[name].is_not_distinct_from(row[name]) for name in ("episode_id", "step", "rater")]

        def write(connection: Connection) -> None:
            _lock_alive(connection, feedback.episode_id)
            if feedback.rater is not None:
                connection.execute(delete(ratings).where(*same))
            connection.execute(insert(ratings), row)

        await self._write(write)

    async def feedback(self, episode_id: str) -> list[Feedback]:
        query = select(ratings).where(ratings.c.episode_id == episode_id).order_by(ratings.c.feedback_id)

        def read(connection: Connection) -> list[Feedback]:
            return [feedback_value(row) for row in connection.execute(query).mappings()]

        return await self._read(read)

    async def put_policy(self, policy: StoredPolicy) -> None:
        row = policy_row(policy)

        def write(connection: Connection) -> None:
            connection.execute(delete(policies).where(policies.c.name == policy.name))
            connection.execute(insert(policies), row)

        await self._write(write)

    async def delete_policy(self, name: str) -> None:
        gone = delete(policies).where(policies.c.name == name)
        await self._write(lambda connection: connection.execute(gone))

    async def policies(self) -> list[StoredPolicy]:
        query = select(policies).order_by(policies.c.name)

        def read(connection: Connection) -> list[StoredPolicy]:
            return [StoredPolicy(**row) for row in connection.execute(query).mappings()]

        return await self._read(read)

    async def num_active(self, tenant: str | None = None) -> int:
        query = select(func.count()).select_from(episodes).where(episodes.c.status == "active")
        if tenant is not None:
            query = query.where(episodes.c.tenant == tenant)
        return await self._read(lambda connection: connection.execute(query).scalar_one())

    async def add_key(self, key: StoredKey) -> None:
        row = key_row(key)
        await self._write(lambda connection: connection.execute(insert(keys), row))

    async def revoke_key(self, key_id: str, at: float) -> bool:
        revoked = update(keys).where(keys.c.key_id == key_id, keys.c.revoked_at.is_(None)).values(revoked_at=at)
        return await self._write(lambda connection: connection.execute(revoked).rowcount > 0)

    async def keys(self) -> list[StoredKey]:
        query = select(keys).order_by(keys.c.created_at, keys.c.key_id)

        def read(connection: Connection) -> list[StoredKey]:
            return [key_record(row) for row in connection.execute(query).mappings()]

        return await self._read(read)

    async def delete(self, episode_id: str) -> bool:
        blank = {column.name: None for column in (*LABEL_COLUMNS.values(), episodes.c.expires_at)}
        values = {"deleted_at": episodes.c.updated_at, "request": "{}", "status": "ended", **blank}
        tombstone = update(episodes).where(episodes.c.episode_id == episode_id).values(values)

        def write(connection: Connection) -> bool:
            family = {row.episode_id: row for row in connection.execute(locked(_lineage_of(episode_id)))}
            if episode_id not in family or family[episode_id].deleted_at is not None:
                return False
            connection.execute(tombstone)
            for table in (ancestors, tags, ratings):
                connection.execute(delete(table).where(table.c.episode_id == episode_id))
            for member in family:
                _drop_unread_steps(connection, member)
            return True

        return await self._write(write)

    async def _write(self, function: Callable[[Connection], _T]) -> _T:
        try:
            return await self._connections.write(function)
        except IntegrityError as error:  # another replica wrote the same row at the same time
            raise StoreUnavailable(f"the store failed: {reason(error)}") from error

    async def _write_together(self, changes: Sequence[Change]) -> Sequence[Exception | None]:
        """Writes the changes in one transaction. If another replica creates one of the episodes at the same time, the
        transaction fails, and each change is written in its own transaction."""
        try:
            return await self._connections.write(lambda connection: write_changes(connection, changes))
        except IntegrityError:
            if len(changes) == 1:
                return [EpisodeExists() if isinstance(changes[0], StoredEpisode) else StepTaken()]
            return [result for change in changes for result in await self._write_together([change])]


def _read_episode(connection: Connection, episode_id: str) -> StoredEpisode | None:
    row = connection.execute(select(episodes).where(episodes.c.episode_id == episode_id)).mappings().first()
    return None if row is None else episode_record(row)


def _read_steps(connection: Connection, episode_id: str, index: int | None = None) -> list[Step]:
    # A join has no limit on the number of ancestors. One condition per ancestor would exceed SQLite's limit of 1,000 on
    # the depth of an expression.
    inherited = and_(steps.c.episode_id == ancestors.c.ancestor_id, steps.c.step < ancestors.c.num_steps)
    parts = [
        select(steps).where(steps.c.episode_id == episode_id),
        select(steps).join(ancestors, inherited).where(ancestors.c.episode_id == episode_id),
    ]
    if index is not None:
        parts = [part.where(steps.c.step == index) for part in parts]
    query = union_all(*parts).order_by("step")
    return [step_value(row) for row in connection.execute(query).mappings()]


def _lock_alive(connection: Connection, episode_id: str) -> None:
    """Locks the episode, so that it cannot be deleted until the transaction ends. Raises EpisodeGone."""
    found = connection.execute(locked(episodes.c.episode_id == episode_id)).first()
    if found is None or found.deleted_at is not None:
        raise EpisodeGone


def _lineage_of(episode_id: str) -> ColumnElement[bool]:
    """Returns the condition that selects the episode and its ancestors."""
    lineage = select(ancestors.c.ancestor_id).where(ancestors.c.episode_id == episode_id)
    return or_(episodes.c.episode_id == episode_id, episodes.c.episode_id.in_(lineage))


def _lineage(connection: Connection, parent_id: str, at_step: int) -> list[tuple[str, int]]:
    """Returns the ancestors whose steps a fork of the parent at this step shares, oldest first.

    Each item is (episode id, num_steps): the fork shares the steps stored under that id with an index below num_steps.
    """
    query = select(ancestors).where(ancestors.c.episode_id == parent_id).order_by(ancestors.c.num_steps)
    inherited = [(row["ancestor_id"], row["num_steps"]) for row in connection.execute(query).mappings()]
    found: list[tuple[str, int]] = []
    reached = 0
    for ancestor, num_steps in [*inherited, (parent_id, at_step)]:
        if reached < at_step and num_steps > reached:
            reached = min(num_steps, at_step)
            found.append((ancestor, reached))
    return found


def _drop_unread_steps(connection: Connection, episode_id: str) -> None:
    """If the episode is deleted, deletes those of its steps that no fork shares."""
    gone = select(episodes.c.episode_id).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_not(None))
    num_read = select(func.max(ancestors.c.num_steps)).where(ancestors.c.ancestor_id == episode_id).scalar_subquery()
    unread = steps.c.step >= func.coalesce(num_read, 0)
    connection.execute(delete(steps).where(steps.c.episode_id == episode_id, exists(gone), unread))


def _older(created_at: float, episode_id: str) -> ColumnElement[bool]:
    """Returns the condition of keyset pagination: episodes that sort after the cursor, newest first."""
    if math.isnan(created_at) or not storable(episode_id):
        return false()
    created = episodes.c.created_at
    return or_(created < created_at, and_(created == created_at, episodes.c.episode_id < episode_id))


def _conditions(tenant: str | None, where: EpisodeFilter) -> list[ColumnElement[bool]]:
    columns: dict[str, ColumnElement[Any]] = {**LABEL_COLUMNS, "tenant": episodes.c.tenant, "status": episodes.c.status}
    filters: dict[str, Any] = {**where, "tenant": tenant}
    given = {name: value for name, value in filters.items() if value is not None}
    if not all(map(storable, given.values())):  # no stored value is equal to such a text
        return [false()]
    tag = given.pop("tag", None)
    conditions = [columns[name] == value for name, value in given.items()]
    if tag is not None:
        conditions.append(episodes.c.episode_id.in_(select(tags.c.episode_id).where(tags.c.tag == tag)))
    return conditions
