"""Transactions on a SQLite file. Each transaction runs in a thread; one thread writes, several read."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from service.store.base import StoreRefused, StoreUnavailable
from service.store.connections import FAILURES, Patience, reason
from service.store.migrations import migrate

_T = TypeVar("_T")

_NUM_READERS = 4
_LARGEST_CHECKED = 256 << 20
"""Maximum size in bytes of a file that is checked for damage at the start. The check of this size takes a second."""

_DAMAGED = (
    "Restore a backup, or recover what can be read with `sqlite3 {path} .recover | sqlite3 NEW`, and use the file NEW."
)
_REMEDIES = {
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_BUSY: "Another process has locked the file. Stop that process first.",
    sqlite3.SQLITE_FULL: "The disk is full. Free some space.",
}
_NO_ACCESS = "The path must be a file, and the service must be able to read and write it and its folder."


class SQLiteConnections:
    """The connections to one file. `url` is sqlite:///FILE.

    A whole transaction is one call in a thread. SQLAlchemy's asyncio extension switches threads for each statement,
    which takes longer than the statements themselves.
    """

    def __init__(self, url: URL, patience: Patience) -> None:
        self._path = Path(str(url.database))
        # Without an isolation level Python's sqlite3 begins no transactions itself: `_begun` chooses their kind.
        connect_args = {"timeout": patience.lock_s, "isolation_level": None}
        self._engine = create_engine(url, pool_size=1 + _NUM_READERS, connect_args=connect_args, hide_parameters=True)
        self._lock_s = patience.lock_s
        event.listen(self._engine, "connect", self._connected)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="store-read")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._writer: Connection | None = None

    async def open(self, revision: str = "head") -> None:
        try:
            await asyncio.to_thread(self._prepare, revision)
        except (SQLAlchemyError, OSError) as error:
            raise StoreRefused(f"the store {self._path}: {reason(error)}. {self._remedy(error)}") from error

    async def close(self) -> None:
        for threads in (self._writers, self._readers):
            await asyncio.to_thread(threads.shutdown)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._engine.dispose()

    async def read(self, function: Callable[[Connection], _T]) -> _T:
        return await self._run(self._readers, partial(self._reading, function))

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        return await self._run(self._writers, partial(self._writing, function))

    async def _run(self, threads: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, call)
        except IntegrityError:
            raise
        except sqlite3.IntegrityError as error:
            raise IntegrityError(None, None, error) from error
        except (*FAILURES, sqlite3.Error) as error:
            raise StoreUnavailable(f"the store failed: {reason(error)}") from error

    def _reading(self, function: Callable[[Connection], _T]) -> _T:
        with self._begun("BEGIN") as connection:
            return _called(function, connection)

    def _writing(self, function: Callable[[Connection], _T]) -> _T:
        """Runs a transaction on the connection of the writing thread, which is kept until a transaction fails."""
        if self._writer is None:
            self._writer = self._engine.connect()
        try:
            driver: Any = self._writer.connection.driver_connection
            # IMMEDIATE takes the write lock at once; upgrading a read lock later can fail.
            driver.execute("BEGIN IMMEDIATE")
            result = _called(function, self._writer)
            if self._writer.in_transaction():  # a statement was executed by SQLAlchemy
                self._writer.commit()
            else:
                driver.execute("COMMIT")
        except BaseException:
            self._writer.close()
            self._writer = None
            raise
        return result

    @contextmanager
    def _begun(self, begin: str) -> Generator[Connection]:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(begin)
            yield connection
            connection.commit()

    def _connected(self, connection: Any, _record: Any) -> None:
        _set_pragmas(connection, self._lock_s)

    def _prepare(self, revision: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._begun("BEGIN IMMEDIATE") as connection:
                self._check(connection)
                migrate(connection, f"the store {self._path}", revision)
        except BaseException:
            self._engine.dispose()
            raise

    def _check(self, connection: Connection) -> None:
        if self._path.stat().st_size > _LARGEST_CHECKED:
            return
        found = " ".join(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one().split())
        if found != "ok":
            raise StoreRefused(f"the store {self._path} is damaged: {found}. {_DAMAGED.format(path=self._path)}")

    def _remedy(self, error: Exception) -> str:
        code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF
        return _REMEDIES.get(code, _NO_ACCESS).format(path=self._path)


def _called(function: Callable[[Connection], _T], connection: Connection) -> _T:
    try:
        return function(connection)
    except StopIteration as error:  # a future cannot carry it, so the caller would wait forever
        raise RuntimeError("a transaction raised StopIteration") from error


def _set_pragmas(connection: Any, lock_s: float) -> None:
    try:
        _enable_wal(connection, time.monotonic() + lock_s)
        connection.execute("PRAGMA synchronous=FULL")  # an answered step survives a power cut, not only a crash
    except sqlite3.Error:
        connection.close()  # SQLAlchemy would leave it open
        raise


def _enable_wal(connection: Any, give_up_at: float) -> None:
    """Enables write-ahead logging. Retries, because for this change SQLite does not wait for a lock: if several
    processes opened a new file at the same time, all but one would fail."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
            time.sleep(0.01)
