"""Transactions on PostgreSQL through asyncpg: connection pool, timeouts, and the classification of errors."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

import asyncpg  # pyright: ignore[reportMissingTypeStubs] - it has none
from sqlalchemy import URL, Connection, event, text
from sqlalchemy.exc import IntegrityError, InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from service.store.base import StoreRefused, StoreUnavailable
from service.store.connections import FAILURES, Patience, reason
from service.store.migrations import migrate

_T = TypeVar("_T")

_NUM_CONNECTIONS = 8
_CONNECT_S = 5.0
_RECYCLE_S = 600  # a proxy or firewall between service and server may drop a connection that is idle for long
_MIGRATION_LOCK = 0x65706973  # an arbitrary number that other programs are unlikely to use

_FAILURES = (*FAILURES, asyncpg.PostgresError, asyncpg.InterfaceError)
_INVALID_VALUE = "22"
"""Prefix of the SQLSTATEs of a value that the database cannot store. It is a bug, and a retry does not help."""
_REFUSALS = ("28", "3D", "42", "0A", "25006")
"""Prefixes of the SQLSTATEs for which a retry does not help: authentication, unknown database, privileges and syntax,
unsupported feature, read-only standby."""


class PostgreSQLConnections:
    """The connection pool of one database. `url` is postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE."""

    def __init__(self, url: URL, patience: Patience) -> None:
        self._url, self._patience = _for_asyncpg(url), patience
        limits = {
            "application_name": "episodic",
            "lock_timeout": _ms(patience.lock_s),
            "statement_timeout": _ms(patience.transaction_s),
            # If a replica loses its connection in a transaction, the server must release its locks.
            "idle_in_transaction_session_timeout": _ms(patience.transaction_s),
        }
        self._engine = create_async_engine(
            self._url,
            pool_size=_NUM_CONNECTIONS,
            max_overflow=0,
            pool_timeout=patience.transaction_s,
            pool_recycle=_RECYCLE_S,
            hide_parameters=True,
            connect_args={"timeout": _CONNECT_S, "server_settings": limits},
        )
        self._open: WeakSet[Any] = WeakSet()
        event.listen(self._engine.sync_engine, "connect", self._remember)
        event.listen(self._engine.sync_engine, "checkout", _refuse_closed)
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    async def open(self, revision: str = "head") -> None:
        give_up_at = time.monotonic() + self._patience.start_s
        while True:
            try:
                return await self._migrate(revision)
            except _FAILURES as error:
                if _state(error).startswith(_REFUSALS):
                    raise StoreRefused(
                        f"{self._place} refuses access: {reason(error)}. Check the user, the password, the database "
                        "and its privileges."
                    ) from error
                if time.monotonic() >= give_up_at:
                    raise StoreRefused(
                        f"{self._place} cannot be reached: {reason(error)}. Check that the server runs, and the host "
                        "and port in the URL."
                    ) from error
            except (TypeError, ValueError) as error:  # an option in the URL that asyncpg does not know
                raise StoreRefused(
                    f"{self._place}: the options in the URL (after ?) are invalid: {reason(error)}"
                ) from error
            await asyncio.sleep(min(0.5, self._patience.start_s))

    async def close(self) -> None:
        for connection in self._open:
            connection.terminate()  # a graceful close would wait for the server's answer
        await self._engine.dispose()

    async def read(self, function: Callable[[Connection], _T]) -> _T:
        return await self._run(self._reading, function)

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        return await self._run(self._engine, function)

    async def _run(self, engine: AsyncEngine, function: Callable[[Connection], _T]) -> _T:
        """Runs a function in a transaction. If the caller is cancelled, SQLAlchemy closes the connection, so that none
        returns to the pool with an open transaction."""
        try:
            async with asyncio.timeout(self._patience.transaction_s), engine.begin() as connection:
                return await connection.run_sync(function)
        except IntegrityError:
            raise
        except _FAILURES as error:
            if _state(error).startswith(_INVALID_VALUE):
                raise
            raise StoreUnavailable(f"the store failed: {reason(error)}") from error

    async def _migrate(self, revision: str) -> None:
        """Migrates the schema on a separate connection without timeouts, because a migration may take long."""
        connect_args = {"timeout": _CONNECT_S}
        engine = create_async_engine(self._url, poolclass=NullPool, connect_args=connect_args, hide_parameters=True)
        try:
            async with engine.begin() as connection:
                # If several replicas start at the same time, one migrates, and the others wait until it is done.
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                await connection.run_sync(migrate, self._place, revision)
        finally:
            await engine.dispose()

    def _remember(self, connection: Any, _record: Any) -> None:
        self._open.add(connection.driver_connection)

    @property
    def _place(self) -> str:
        """The database for messages, without the user and the password."""
        return f"the PostgreSQL database {self._url.database!r} at {self._url.host}:{self._url.port or 5432}"


def _for_asyncpg(url: URL) -> URL:
    """Sets the driver, and replaces libpq's option `sslmode`, common in URLs from providers, with asyncpg's `ssl`."""
    ssl = url.query.get("sslmode")
    url = url.set(drivername="postgresql+asyncpg")
    return url if ssl is None else url.difference_update_query(["sslmode"]).update_query_dict({"ssl": ssl})


def _refuse_closed(connection: Any, _record: Any, _proxy: Any) -> None:
    """Makes the pool replace a connection that the server has closed. This check needs no round trip to the server."""
    if connection.driver_connection.is_closed():
        raise InvalidatePoolError


def _state(error: BaseException) -> str:
    """Returns the SQLSTATE of an error, or an empty string."""
    original = getattr(error, "orig", None) or error
    return getattr(original, "sqlstate", None) or ""


def _ms(seconds: float) -> str:
    return str(max(int(seconds * 1000), 1))
