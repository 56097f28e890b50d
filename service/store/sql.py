"""The SQL store: implements `Store` with statements that SQLite and PostgreSQL share."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    RowMapping,
    and_,
    delete,
    func,
    insert,
    make_url,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError

from service.filters import By, EpisodeFilter
from service.store.base import (
    EVERY,
    NEWEST_FIRST,
    Change,
    Commit,
    EpisodeExists,
    EpisodeGone,
    Ordering,
    OutcomePage,
    Place,
    StepSample,
    StepTaken,
    StoreUnavailable,
)
from service.store.changes import insert_episodes, locked, rows_of, write_changes
from service.store.connections import Connections, Patience, is_duplicate, reason
from service.store.deletion import delete_ended, delete_episodes, remove_tombstones
from service.store.group_commit import GroupCommit, OnCommit
from service.store.labelling import Labelling
from service.store.listing import is_storable, listed, listing, rare_selection
from service.store.migrations import current_revision
from service.store.outcomes import outcome_page, step_samples
from service.store.policies import (
    delete_alias,
    put_version,
    read_catalog,
    read_marks,
    remove_unused,
    roll_back,
    set_default,
)
from service.store.schema import (
    ancestors,
    episode_record,
    episodes,
    feedback_row,
    feedback_value,
    key_record,
    key_row,
    keys,
    ratings,
    step_value,
    steps,
)
from service.store.sqlite import SQLiteConnections
from service.trajectory import Catalog, Feedback, Step, StoredEpisode, StoredKey, StoredVersion

_T = TypeVar("_T")
_Row = TypeVar("_Row")

_FEW_ROWS = 8


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
        self._labelling = Labelling(self._read, self._connections.write)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        await self._connections.open()
        self._group.start()
        self._labelling.start()

    async def migrate(self, revision: str) -> None:
        """Upgrades or downgrades the schema to a revision. The store must not be open. Raises StoreRefused."""
        try:
            await self._connections.open(revision)
        finally:
            await self._connections.close()

    async def revision(self) -> str | None:
        """The revision of the schema, or None if there is none. The store need not be open, and is not migrated."""
        return await self._read(current_revision)

    async def close(self) -> None:
        await self._labelling.stop()
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
        opened = [rows_of(record) for record in records]

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
            if not is_duplicate(error):
                raise
            raise EpisodeExists from error

    async def episodes(
        self,
        *,
        limit: int,
        before: Place | None,
        tenant: str | None = None,
        where: EpisodeFilter = EVERY,
        ordering: Ordering = NEWEST_FIRST,
    ) -> list[StoredEpisode]:
        if where.keys() & {"env", "metadata"}:
            await self._labelling.catch_up()
        if not is_storable(tenant, where):
            return []

        def read(connection: Connection) -> Sequence[RowMapping]:
            query = listing(limit, before, tenant, where, ordering, rare_selection(connection, where))
            return connection.execute(query).mappings().all()

        return await _convert(await self._read(read), lambda row: listed(row, ordering))

    async def outcomes(
        self, *, limit: int, after: Place | None, tenant: str, where: EpisodeFilter = EVERY, by: By
    ) -> OutcomePage:
        if after is None:
            await self._labelling.catch_up()
        if not is_storable(tenant, where):
            return OutcomePage((), {}, {})
        return await self._read(lambda connection: outcome_page(connection, limit, after, tenant, where, by))

    async def step_samples(self, episode_ids: Sequence[str], num_steps: int) -> list[StepSample]:
        return await self._read(lambda connection: step_samples(connection, episode_ids, num_steps))

    async def commit(self, commit: Commit) -> None:
        await self._group.submit(commit)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        first = index or 0
        rows = await self._read(lambda connection: _read_steps(connection, episode_id, first, index))
        return await _convert(rows, step_value)

    async def trajectory(
        self, episode_id: str, first: int = 0, last: int | None = None
    ) -> tuple[StoredEpisode, list[Step]] | None:
        def read(connection: Connection) -> tuple[StoredEpisode, Sequence[RowMapping]] | None:
            record = _read_episode(connection, episode_id)
            return record and (record, _read_steps(connection, episode_id, first, last))

        found = await self._read(read)
        return found and (found[0], await _convert(found[1], step_value))

    async def next_expiry(self) -> float | None:
        query = select(func.min(episodes.c.expires_at))
        return await self._read(lambda connection: connection.execute(query).scalar())

    async def expired(self, now: float, limit: int) -> list[str]:
        query = select(episodes.c.episode_id).where(episodes.c.expires_at <= now)
        query = query.order_by(episodes.c.expires_at).limit(limit)
        return await self._read(lambda connection: list(connection.execute(query).scalars()))

    async def add_feedback(self, feedback: Feedback) -> Feedback:
        row = feedback_row(feedback)
        same = [ratings.c[name].is_not_distinct_from(row[name]) for name in ("episode_id", "step", "rater")]

        has_key = [ratings.c[name] == row[name] for name in ("episode_id", "idempotency_key")]

        def write(connection: Connection) -> Feedback:
            _lock_alive(connection, feedback.episode_id)
            if feedback.idempotency_key is not None:
                earlier = connection.execute(select(ratings).where(*has_key)).mappings().first()
                if earlier is not None:
                    return feedback_value(earlier)
            if feedback.rater is not None:
                connection.execute(delete(ratings).where(*same))
            connection.execute(insert(ratings), row)
            return feedback

        return await self._write(write)

    async def feedback(self, episode_id: str) -> list[Feedback]:
        query = select(ratings).where(ratings.c.episode_id == episode_id).order_by(ratings.c.feedback_id)

        def read(connection: Connection) -> list[Feedback]:
            return [feedback_value(row) for row in connection.execute(query).mappings()]

        return await self._read(read)

    async def put_version(self, version: StoredVersion, *, move_alias: bool) -> StoredVersion:
        now = time.time()
        return await self._write(lambda connection: put_version(connection, version, now if move_alias else None))

    async def roll_back(self, name: str) -> StoredVersion | None:
        return await self._write(lambda connection: roll_back(connection, name))

    async def delete_alias(self, name: str) -> bool:
        return await self._write(lambda connection: delete_alias(connection, name))

    async def set_default_policy(self, policy: str | None) -> None:
        await self._write(lambda connection: set_default(connection, policy))

    async def remove_unused_versions(self, keep: Sequence[str] = ()) -> list[StoredVersion]:
        return await self._write(lambda connection: remove_unused(connection, keep))

    async def catalog(self) -> Catalog:
        return await self._read(read_catalog)

    async def catalog_marks(self) -> object:
        return await self._read(read_marks)

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
        now = time.time()
        return bool(await self._write(lambda connection: delete_episodes(connection, [episode_id], now)))

    async def delete_ended(self, ended_before: float, limit: int) -> list[str]:
        now = time.time()
        return await self._write(lambda connection: delete_ended(connection, ended_before, limit, now))

    async def remove_tombstones(self, deleted_before: float, limit: int) -> int:
        return await self._write(lambda connection: remove_tombstones(connection, deleted_before, limit))

    async def _write(self, function: Callable[[Connection], _T]) -> _T:
        try:
            return await self._connections.write(function)
        except IntegrityError:  # another replica wrote the same row at the same time; the next try reads its row
            pass
        try:
            return await self._connections.write(function)
        except IntegrityError as error:
            if not is_duplicate(error):
                raise
            raise StoreUnavailable(f"the store failed: {reason(error)}") from error

    async def _write_together(self, changes: Sequence[Change]) -> Sequence[Exception | None]:
        """Writes the changes in one transaction.

        The transaction fails if another replica creates one of the episodes at the same time, or if a bug makes one of
        the changes fail. Then each change is written in its own transaction, so that the others are not affected.
        """
        try:
            return await self._connections.write(lambda connection: write_changes(connection, changes))
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - each change has its own result
            if len(changes) > 1:
                return [result for change in changes for result in await self._write_together([change])]
            if not (isinstance(error, IntegrityError) and is_duplicate(error)):
                return [error]
            return [EpisodeExists() if isinstance(changes[0], StoredEpisode) else StepTaken()]


def _read_episode(connection: Connection, episode_id: str) -> StoredEpisode | None:
    row = connection.execute(select(episodes).where(episodes.c.episode_id == episode_id)).mappings().first()
    return None if row is None else episode_record(row)


def _read_steps(connection: Connection, episode_id: str, first: int, last: int | None) -> Sequence[RowMapping]:
    # A join has no limit on the number of ancestors. One condition per ancestor would exceed SQLite's limit of 1,000 on
    # the depth of an expression.
    inherited = and_(steps.c.episode_id == ancestors.c.ancestor_id, steps.c.step < ancestors.c.num_steps)
    parts = [
        select(steps).where(steps.c.episode_id == episode_id),
        select(steps).join(ancestors, inherited).where(ancestors.c.episode_id == episode_id),
    ]
    if first:
        parts = [part.where(steps.c.step >= first) for part in parts]
    if last is not None:
        parts = [part.where(steps.c.step <= last) for part in parts]
    return connection.execute(union_all(*parts).order_by("step")).mappings().all()


async def _convert(rows: Sequence[_Row], convert: Callable[[_Row], _T]) -> list[_T]:
    """Converts rows to values: many in a thread, because that takes long and must not block the event loop."""
    if len(rows) <= _FEW_ROWS:
        return [convert(row) for row in rows]
    return await asyncio.to_thread(lambda: [convert(row) for row in rows])


def _lock_alive(connection: Connection, episode_id: str) -> None:
    """Locks the episode, so that it cannot be deleted until the transaction ends. Raises EpisodeGone."""
    found = connection.execute(locked(episodes.c.episode_id == episode_id)).first()
    if found is None or found.deleted_at is not None:
        raise EpisodeGone


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
