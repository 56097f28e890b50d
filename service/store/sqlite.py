"""Owns transactions on a SQLite file: each is one call in a thread, and one thread writes."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from service.store.base import StoreRefused, StoreUnavailable
from service.store.connections import Patience, reason
from service.store.migrations import migrate

_T = TypeVar("_T")

_NUM_READERS = 4
_LARGEST_CHECKED = 256 << 20
"""Bytes of a file that is looked through at the start: about a second's worth."""

_DAMAGED = "Restore a backup, or save what can be read: sqlite3 {path} .recover | sqlite3 NEW, and serve NEW."
_WAYS_OUT = {
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_BUSY: "Another process writes to it and does not let go: end that one first.",
    sqlite3.SQLITE_FULL: "Make room on its disk.",
}
_NO_ACCESS = "The service must be able to read and to write the file and its folder, and the file must be no folder."


class SQLiteConnections:
    """`url` = sqlite:///FILE.

    A transaction is one call in a thread: to go there and back for each of its statements, as SQLAlchemy's asyncio
    extension does, costs more than the statements.
    """

    def __init__(self, url: URL, patience: Patience) -> None:
        self._path = Path(str(url.database))
        # No isolation level: Python's sqlite3 begins no transaction then, and we begin the one that we want.
        connect_args = {"timeout": patience.lock_s, "isolation_level": None}
        self._engine = create_engine(url, pool_size=1 + _NUM_READERS, connect_args=connect_args, hide_parameters=True)
        self._lock_s = patience.lock_s
        event.listen(self._engine, "connect", self._connected)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="store-read")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="store-write")

    async def open(self, revision: str = "head") -> None:
        try:
            await asyncio.to_thread(self._prepare, revision)
        except (SQLAlchemyError, OSError) as error:
            raise StoreRefused(f"the store {self._path}: {reason(error)}. {self._way_out(error)}") from error

    async def close(self) -> None:
        for threads in (self._writers, self._readers):
            await asyncio.to_thread(threads.shutdown)
        self._engine.dispose()

    async def read(self, function: Callable[[Connection], _T]) -> _T:
        return await self._run(self._readers, "BEGIN", function)

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        return await self._run(self._writers, "BEGIN IMMEDIATE", function)  # a lock for reading cannot always be raised

    async def _run(
        self,
        threads: ThreadPoolExecutor,
        begin: Literal["BEGIN", "BEGIN IMMEDIATE"],
        function: Callable[[Connection], _T],
    ) -> _T:
        def call() -> _T:
            with self._begun(begin) as connection:
                return function(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(threads, call)
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError) as error:
            raise StoreUnavailable(f"the store failed: {reason(error)}") from error

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

    def _way_out(self, error: Exception) -> str:
        code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF
        return _WAYS_OUT.get(code, _NO_ACCESS).format(path=self._path)


def _set_pragmas(connection: Any, lock_s: float) -> None:
    try:
        _keep_a_log(connection, time.monotonic() + lock_s)
        connection.execute("PRAGMA synchronous=FULL")  # an answered step survives a power cut, not only a crash
    except sqlite3.Error:
        connection.close()  # SQLAlchemy would leave it open
        raise


def _keep_a_log(connection: Any, give_up_at: float) -> None:
    """SQLite waits for no lock when it changes a new file to write-ahead logging: several that open it would fail."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
            time.sleep(0.01)
