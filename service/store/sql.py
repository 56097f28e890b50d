"""Owns the SQL store: SQLite by default, any async SQLAlchemy URL by setting; concurrent acts share a commit."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from sqlalchemy import and_, bindparam, delete, event, func, insert, or_, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from service.store.base import Change, Commit, EpisodeExists, StepTaken, StoreUnavailable
from service.store.group_commit import GroupCommit, OnCommit
from service.store.schema import episode_record, episode_row, episodes, head_row, step_row, step_value, steps
from service.trajectory import EpisodeHead, EpisodeRecord, Status, Step

_MIGRATIONS = Path(__file__).parent / "migrations"

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
    """Episodes in a SQL database. `on_commit(num_acts, seconds)` is called after each shared commit."""

    def __init__(self, url: str, on_commit: OnCommit = _ignore) -> None:
        self._url = make_url(url)
        self._engine: AsyncEngine = create_async_engine(self._url, **_engine_options(self._url.get_backend_name()))
        if self._url.get_backend_name() == "sqlite":
            event.listen(self._engine.sync_engine, "connect", _set_pragmas)
        self._writer = GroupCommit(self._write, on_commit)

    async def open(self) -> None:
        try:
            if self._url.get_backend_name() == "sqlite" and self._url.database:
                Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(self._migrate)
        except (SQLAlchemyError, OSError) as error:
            raise StoreUnavailable(f"cannot open the store: {_reason(error)}") from error
        self._writer.start()

    async def close(self) -> None:
        await self._writer.stop()
        await self._engine.dispose()

    async def create(self, record: EpisodeRecord) -> None:
        await self._writer.submit(record)

    async def episode(self, episode_id: str) -> EpisodeRecord | None:
        async with self._transaction() as connection:
            rows = await connection.execute(select(episodes).where(episodes.c.episode_id == episode_id))
            row = rows.mappings().first()
        return None if row is None else episode_record(row)

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
        async with self._transaction() as connection:
            return [episode_record(row) for row in (await connection.execute(query)).mappings()]

    async def commit(self, commit: Commit) -> None:
        await self._writer.submit(commit)

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        query = select(steps).where(steps.c.episode_id == episode_id).order_by(steps.c.step)
        if index is not None:
            query = query.where(steps.c.step == index)
        async with self._transaction() as connection:
            return [step_value(row) for row in (await connection.execute(query)).mappings()]

    async def num_active(self) -> int:
        query = select(func.count()).select_from(episodes).where(episodes.c.status == "active")
        async with self._transaction() as connection:
            return (await connection.execute(query)).scalar_one()

    async def delete(self, episode_id: str) -> bool:
        tombstone = update(episodes).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_(None))
        async with self._transaction() as connection:
            found = await connection.execute(
                tombstone.values(deleted_at=episodes.c.updated_at, request="{}", status="ended")
            )
            await connection.execute(delete(steps).where(steps.c.episode_id == episode_id))
        return found.rowcount > 0

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
        advances = [{"id": act.step.episode_id, "expected": act.step.index, **head_row(act.head)} for act in acted]
        try:
            async with self._transaction() as connection:
                if opened:
                    await connection.execute(insert(episodes), opened)
                if acted:
                    advanced = await connection.execute(_ADVANCE, advances)
                    if advanced.rowcount != len(acted):
                        raise StepTaken
                    await connection.execute(insert(steps), [step_row(act.step) for act in acted])
        except IntegrityError as error:
            raise (EpisodeExists if opened else StepTaken) from error

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[AsyncConnection]:
        try:
            async with self._engine.begin() as connection:
                yield connection
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


def _engine_options(backend: str) -> dict[str, Any]:
    if backend == "sqlite":
        return {"pool_size": 4, "connect_args": {"timeout": 10}}
    return {"pool_pre_ping": True}


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an answered step survives a power cut, not only a crash
    cursor.close()


def _reason(error: Exception) -> str:
    """The database's own words, without the statement and its parameters."""
    return str(getattr(error, "orig", None) or error).split("\n")[0][:200]
