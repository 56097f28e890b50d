"""Owns the SQL store: SQLite by default, any SQLAlchemy async URL by setting, with commits shared by concurrent acts."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from sqlalchemy import and_, bindparam, delete, event, insert, or_, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from service.store.base import Commit, StepTaken, StoreUnavailable
from service.store.group_commit import GroupCommit
from service.store.schema import episode_record, episode_row, episodes, head_row, step_row, step_value, steps
from service.trajectory import EpisodeRecord, Status, Step

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
    .values({name: bindparam(name) for name in head_row(EpisodeRecord.__dataclass_fields__["head"].default_factory())})
)


class SQLStore:
    """Episodes in a SQL database. `on_commit(num_acts, seconds)` is called after each shared commit."""

    def __init__(self, url: str, on_commit: Any = lambda num_acts, seconds: None) -> None:
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

    async def create(self, record: EpisodeRecord) -> EpisodeRecord | None:
        async with self._transaction() as connection:
            try:
                await connection.execute(insert(episodes), episode_row(record))
            except IntegrityError:
                await connection.rollback()
            else:
                return None
        return await self.episode(record.config.episode_id)

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

    async def delete(self, episode_id: str) -> bool:
        tombstone = update(episodes).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_(None))
        async with self._transaction() as connection:
            found = await connection.execute(
                tombstone.values(deleted_at=episodes.c.updated_at, request="{}", status="ended")
            )
            await connection.execute(delete(steps).where(steps.c.episode_id == episode_id))
        return found.rowcount > 0

    async def _write(self, commits: Sequence[Commit]) -> list[StepTaken | None]:
        """One transaction for all; if any of them is refused, one for each, so that it spoils no other."""
        try:
            await self._write_together(commits)
        except StepTaken:
            if len(commits) == 1:
                return [StepTaken()]
            return [result for commit in commits for result in await self._write([commit])]
        return [None] * len(commits)

    async def _write_together(self, commits: Sequence[Commit]) -> None:
        advances = [
            {"id": commit.step.episode_id, "expected": commit.step.index, **head_row(commit.head)} for commit in commits
        ]
        try:
            async with self._transaction() as connection:
                advanced = await connection.execute(_ADVANCE, advances)
                if advanced.rowcount != len(commits):
                    raise StepTaken
                await connection.execute(insert(steps), [step_row(commit.step) for commit in commits])
        except IntegrityError as error:
            raise StepTaken from error

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
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
