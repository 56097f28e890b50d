"""Owns the SQL store: SQLite, in threads of its own; concurrent acts share a commit."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import alembic.config
from sqlalchemy import (
    Connection,
    Engine,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    make_url,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.sql import ColumnElement, Select

from service.store.base import (
    EVERY,
    Change,
    Commit,
    EpisodeExists,
    EpisodeGone,
    Filter,
    StepTaken,
    StoreUnavailable,
)
from service.store.group_commit import GroupCommit, OnCommit
from service.store.schema import (
    ancestors,
    episode_record,
    episode_row,
    episodes,
    feedback_value,
    head_row,
    policies,
    ratings,
    step_row,
    step_value,
    steps,
    tag_rows,
    tags,
)
from service.trajectory import EpisodeHead, EpisodeRecord, Feedback, KeyRecord, PolicyRecord, Step

_T = TypeVar("_T")

_MIGRATIONS = Path(__file__).parent / "migrations"
_NUM_READERS = 4

# Conditional on the steps that are there: of two that race for one step, the second changes no row.
_ADVANCE = (
    update(episodes)
    .where(
        episodes.c.episode_id == bindparam("id"),
        episodes.c.step == bindparam("expected"),
        episodes.c.status == "active",
        episodes.c.deleted_at.is_(None),
    )
    .values({name: bindparam(name) for name in head_row(EpisodeHead())})
)


def _ignore(num_acts: int, seconds: float) -> None:
    pass


class SQLStore:
    """Episodes in a SQLite file, `url` = sqlite:///FILE. `on_commit(num_acts, seconds)` is told of each commit.

    A transaction is one call in a thread: to go there and back for each of its statements, as SQLAlchemy's asyncio
    extension does, costs more than the statements. There is one thread for writes, as SQLite has one writer.
    """

    def __init__(self, url: str, on_commit: OnCommit = _ignore) -> None:
        self._url = make_url(url)
        self._engine: Engine = create_engine(self._url, pool_size=1 + _NUM_READERS, connect_args={"timeout": 10})
        event.listen(self._engine, "connect", _set_pragmas)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="store-read")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._group = GroupCommit(self._write, on_commit)

    async def open(self) -> None:
        try:
            Path(str(self._url.database)).parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(self._migrate)
        except (SQLAlchemyError, OSError) as error:
            raise StoreUnavailable(f"cannot open the store: {_reason(error)}") from error
        self._group.start()

    async def close(self) -> None:
        await self._group.stop()
        for threads in (self._writers, self._readers):
            await asyncio.to_thread(threads.shutdown)
        self._engine.dispose()

    async def create(self, record: EpisodeRecord) -> None:
        await self._group.submit(record)

    async def episode(self, episode_id: str) -> EpisodeRecord | None:
        return await self._in_transaction(self._readers, lambda connection: _read_episode(connection, episode_id))

    async def fork(self, records: Sequence[EpisodeRecord]) -> None:
        def write(connection: Connection) -> None:
            parent = records[0].config.parent
            assert parent is not None
            _insert_episodes(connection, records)
            if connection.execute(_alive(parent[0])).first() is None:
                raise EpisodeGone
            inherited = _lineage(connection, parent[0], parent[1])
            ids = [record.config.episode_id for record in records]
            rows = [
                {"episode_id": episode_id, "ancestor_id": ancestor, "num_steps": num_steps}
                for episode_id in ids
                for ancestor, num_steps in inherited
            ]
            if rows:
                connection.execute(insert(ancestors), rows)

        try:
            await self._in_transaction(self._writers, write)
        except IntegrityError as error:
            raise EpisodeExists from error

    async def episodes(
        self, *, limit: int, before: tuple[float, str] | None, where: Filter = EVERY
    ) -> list[EpisodeRecord]:
        query = select(episodes).where(episodes.c.deleted_at.is_(None), *_conditions(where))
        if before is not None:
            created, episode_id = episodes.c.created_at, episodes.c.episode_id
            query = query.where(or_(created < before[0], and_(created == before[0], episode_id < before[1])))
        query = query.order_by(episodes.c.created_at.desc(), episodes.c.episode_id.desc()).limit(limit)

        def read(connection: Connection) -> list[EpisodeRecord]:
            return [episode_record(row) for row in connection.execute(query).mappings()]

        return await self._in_transaction(self._readers, read)

    async def commit(self, commit: Commit) -> None:
        await self._group.submit(commit)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        return await self._in_transaction(self._readers, lambda connection: _read_steps(connection, episode_id, index))

    async def trajectory(self, episode_id: str) -> tuple[EpisodeRecord, list[Step]] | None:
        def read(connection: Connection) -> tuple[EpisodeRecord, list[Step]] | None:
            record = _read_episode(connection, episode_id)
            return record and (record, _read_steps(connection, episode_id))

        return await self._in_transaction(self._readers, read)

    async def next_expiry(self) -> float | None:
        query = select(func.min(episodes.c.expires_at))
        return await self._in_transaction(self._readers, lambda connection: connection.execute(query).scalar())

    async def expired(self, now: float, limit: int) -> list[str]:
        query = select(episodes.c.episode_id).where(episodes.c.expires_at <= now)
        query = query.order_by(episodes.c.expires_at).limit(limit)
        return await self._in_transaction(self._readers, lambda connection: list(connection.execute(query).scalars()))

    async def add_feedback(self, feedback: Feedback) -> None:
        row = dataclasses.asdict(feedback)
        same = [ratings.c[name].is_not_distinct_from(row[name]) for name in ("episode_id", "step", "rater")]

        def write(connection: Connection) -> None:
            if connection.execute(_alive(feedback.episode_id)).first() is None:
                raise EpisodeGone
            if feedback.rater is not None:
                connection.execute(delete(ratings).where(*same))
            connection.execute(insert(ratings), row)

        await self._in_transaction(self._writers, write)

    async def feedback(self, episode_id: str) -> list[Feedback]:
        query = select(ratings).where(ratings.c.episode_id == episode_id).order_by(ratings.c.feedback_id)

        def read(connection: Connection) -> list[Feedback]:
            return [feedback_value(row) for row in connection.execute(query).mappings()]

        return await self._in_transaction(self._readers, read)

    async def put_policy(self, policy: PolicyRecord) -> None:
        def write(connection: Connection) -> None:
            connection.execute(delete(policies).where(policies.c.name == policy.name))
            connection.execute(insert(policies), dataclasses.asdict(policy))

        await self._in_transaction(self._writers, write)

    async def delete_policy(self, name: str) -> None:
        gone = delete(policies).where(policies.c.name == name)
        await self._in_transaction(self._writers, lambda connection: connection.execute(gone))

    async def policies(self) -> list[PolicyRecord]:
        query = select(policies).order_by(policies.c.name)

        def read(connection: Connection) -> list[PolicyRecord]:
            return [PolicyRecord(**row) for row in connection.execute(query).mappings()]

        return await self._in_transaction(self._readers, read)

    async def keys(self) -> list[KeyRecord]:
        return []  # until their table is there

    async def num_active(self, tenant: str | None = None) -> int:
        query = select(func.count()).select_from(episodes).where(episodes.c.status == "active")

        def read(connection: Connection) -> int:
            return connection.execute(query).scalar_one()

        return await self._in_transaction(self._readers, read)

    async def delete(self, episode_id: str) -> bool:
        tombstone = update(episodes).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_(None))
        blank = {name: None for name in ("policy", "profile", "episode_group", "expires_at")}
        lineage = select(ancestors.c.ancestor_id).where(ancestors.c.episode_id == episode_id)

        def write(connection: Connection) -> bool:
            values = {"deleted_at": episodes.c.updated_at, "request": "{}", "status": "ended", **blank}
            found = connection.execute(tombstone.values(values))
            candidates = [episode_id, *connection.execute(lineage).scalars()]
            for table in (ancestors, tags, ratings):
                connection.execute(delete(table).where(table.c.episode_id == episode_id))
            for candidate in candidates:
                _drop_unread_steps(connection, candidate)
            return found.rowcount > 0

        return await self._in_transaction(self._writers, write)

    async def _write(self, changes: Sequence[Change]) -> list[Exception | None]:
        """One transaction for all; if any of them is refused, one for each, so that it spoils no other."""
        try:
            await self._write_together(changes)
        except (StepTaken, EpisodeExists, TypeError, ValueError) as error:  # the last two: it cannot be written
            if len(changes) == 1:
                return [error]
            return [result for change in changes for result in await self._write([change])]
        return [None] * len(changes)

    async def _write_together(self, changes: Sequence[Change]) -> None:
        opened = [change for change in changes if isinstance(change, EpisodeRecord)]
        acted = [change for change in changes if isinstance(change, Commit)]

        def write(connection: Connection) -> None:
            if opened:
                _insert_episodes(connection, opened)
            if acted:
                advances = [
                    {"id": act.step.episode_id, "expected": act.step.index, **head_row(act.head)} for act in acted
                ]
                if connection.execute(_ADVANCE, advances).rowcount != len(acted):
                    raise StepTaken
                connection.execute(insert(steps), [step_row(act.step) for act in acted])

        try:
            await self._in_transaction(self._writers, write)
        except IntegrityError as error:
            raise (EpisodeExists if opened else StepTaken) from error

    async def _in_transaction(self, threads: ThreadPoolExecutor, function: Callable[[Connection], _T]) -> _T:
        def call() -> _T:
            with self._engine.begin() as connection:
                return function(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(threads, call)
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError) as error:
            raise StoreUnavailable(f"the store failed: {_reason(error)}") from error

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.set_main_option("path_separator", "os")
        config.attributes["url"] = self._url
        alembic.command.upgrade(config, "head")


def _insert_episodes(connection: Connection, records: Sequence[EpisodeRecord]) -> None:
    connection.execute(insert(episodes), [episode_row(record) for record in records])
    if tagged := [row for record in records for row in tag_rows(record)]:
        connection.execute(insert(tags), tagged)


def _read_episode(connection: Connection, episode_id: str) -> EpisodeRecord | None:
    row = connection.execute(select(episodes).where(episodes.c.episode_id == episode_id)).mappings().first()
    return None if row is None else episode_record(row)


def _read_steps(connection: Connection, episode_id: str, index: int | None = None) -> list[Step]:
    # Whatever the depth of the lineage: a condition for each ancestor would meet SQLite's limit at 1,000 of them.
    inherited = and_(steps.c.episode_id == ancestors.c.ancestor_id, steps.c.step < ancestors.c.num_steps)
    parts = [
        select(steps).where(steps.c.episode_id == episode_id),
        select(steps).join(ancestors, inherited).where(ancestors.c.episode_id == episode_id),
    ]
    if index is not None:
        parts = [part.where(steps.c.step == index) for part in parts]
    query = union_all(*parts).order_by("step")
    return [step_value(row) for row in connection.execute(query).mappings()]


def _alive(episode_id: str) -> Select[Any]:
    return select(episodes.c.parent_step).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_(None))


def _lineage(connection: Connection, parent_id: str, at_step: int) -> list[tuple[str, int]]:
    """Whose rows a fork of the parent at this step begins with: (ancestor, number of steps), the oldest first."""
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
    """Drops those of a deleted episode's steps that no fork reads."""
    gone = select(episodes.c.episode_id).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_not(None))
    num_read = select(func.max(ancestors.c.num_steps)).where(ancestors.c.ancestor_id == episode_id).scalar_subquery()
    unread = steps.c.step >= func.coalesce(num_read, 0)
    connection.execute(delete(steps).where(steps.c.episode_id == episode_id, exists(gone), unread))


def _conditions(where: Filter) -> list[ColumnElement[bool]]:
    columns = {
        episodes.c.status: where.status,
        episodes.c.policy: where.policy,
        episodes.c.profile: where.profile,
        episodes.c.episode_group: where.group,
    }
    conditions = [column == value for column, value in columns.items() if value is not None]
    if where.tag is not None:
        tagged = select(tags.c.episode_id).where(tags.c.tag == where.tag)
        conditions.append(episodes.c.episode_id.in_(tagged))
    return conditions


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an answered step survives a power cut, not only a crash
    cursor.close()


def _reason(error: Exception) -> str:
    """The database's own words, without the statement and its parameters."""
    return str(getattr(error, "orig", None) or error).split("\n")[0][:200]
