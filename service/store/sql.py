"""Owns the SQL store: SQLite, in threads of its own; concurrent acts share a commit."""

import asyncio
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
    func,
    insert,
    make_url,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from service.store.base import Change, Commit, EpisodeExists, StepTaken, StoreUnavailable
from service.store.group_commit import GroupCommit, OnCommit
from service.store.schema import episode_record, episode_row, episodes, head_row, step_row, step_value, steps
from service.trajectory import EpisodeHead, EpisodeRecord, Status, Step

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
        query = select(episodes).where(episodes.c.episode_id == episode_id)

        def read(connection: Connection) -> EpisodeRecord | None:
            row = connection.execute(query).mappings().first()
            return None if row is None else episode_record(row)

        return await self._in_transaction(self._readers, read)

    async def episodes(
        self, *, limit: int, before: tuple[float, str] | None, status: Status | None
    ) -> list[EpisodeRecord]:
        query = select(episodes).where(episodes.c.deleted_at.is_(None))
        if status is not None:
            query = query.where(episodes.c.status == status)
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
        query = select(steps).where(steps.c.episode_id == episode_id).order_by(steps.c.step)
        if index is not None:
            query = query.where(steps.c.step == index)

        def read(connection: Connection) -> list[Step]:
            return [step_value(row) for row in connection.execute(query).mappings()]

        return await self._in_transaction(self._readers, read)

    async def num_active(self) -> int:
        query = select(func.count()).select_from(episodes).where(episodes.c.status == "active")

        def read(connection: Connection) -> int:
            return connection.execute(query).scalar_one()

        return await self._in_transaction(self._readers, read)

    async def delete(self, episode_id: str) -> bool:
        tombstone = update(episodes).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_(None))

        def write(connection: Connection) -> bool:
            found = connection.execute(tombstone.values(deleted_at=episodes.c.updated_at, request="{}", status="ended"))
            connection.execute(delete(steps).where(steps.c.episode_id == episode_id))
            return found.rowcount > 0

        return await self._in_transaction(self._writers, write)

    async def _write(self, changes: Sequence[Change]) -> list[Exception | None]:
        """One transaction for all; if any of them is refused, one for each, so that it spoils no other."""
        try:
            await self._write_together(changes)
        except (StepTaken, EpisodeExists) as error:
            if len(changes) == 1:
                return [error]
            return [result for change in changes for result in await self._write([change])]
        return [None] * len(changes)

    async def _write_together(self, changes: Sequence[Change]) -> None:
        opened = [episode_row(change) for change in changes if isinstance(change, EpisodeRecord)]
        acted = [change for change in changes if isinstance(change, Commit)]

        def write(connection: Connection) -> None:
            if opened:
                connection.execute(insert(episodes), opened)
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


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an answered step survives a power cut, not only a crash
    cursor.close()


def _reason(error: Exception) -> str:
    """The database's own words, without the statement and its parameters."""
    return str(getattr(error, "orig", None) or error).split("\n")[0][:200]
