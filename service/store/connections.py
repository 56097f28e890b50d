"""The interface to a database: how transactions run. SQLite and PostgreSQL differ here and share the SQL statements."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    PendingRollbackError,
    ResourceClosedError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

_T = TypeVar("_T")

FAILURES = (DBAPIError, DisconnectionError, PendingRollbackError, ResourceClosedError, PoolTimeout, OSError)
"""Failures of the database. Other errors of SQLAlchemy, such as CompileError, are bugs of this program."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Timeouts in seconds.

    lock_s: to wait for a lock of another process.
    transaction_s: for a whole transaction (PostgreSQL only).
    start_s: to wait for the database server when the store is opened (PostgreSQL only).
    """

    lock_s: float = 10.0
    transaction_s: float = 15.0
    start_s: float = 30.0


class Connections(Protocol):
    """The connections to one database. A transaction is a function that receives a connection. It is atomic."""

    async def open(self, revision: str = "head") -> None:
        """Migrates the schema to a revision, by default the newest. After another revision only `close` may be called.
        Raises StoreRefused."""
        ...

    async def close(self) -> None: ...

    async def read(self, function: Callable[[Connection], _T]) -> _T:
        """Runs the function in a read-only transaction with one consistent snapshot. Returns its result. Raises
        StoreUnavailable."""
        ...

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        """Runs the function in a transaction and commits it. Returns its result.

        Raises IntegrityError, and what the function raises: then nothing was written. Raises StoreUnavailable: then it
        is unknown whether the changes were written.
        """
        ...


def is_duplicate(error: IntegrityError) -> bool:
    """Returns whether a row with the same key exists. Any other violated constraint is a bug of this program."""
    code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", None)
    return code in ("23505", "SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_UNIQUE")


def reason(error: BaseException) -> str:
    """Returns the first line of the database's message, without the SQL statement and its parameters."""
    message = str(getattr(error, "orig", None) or error) or type(error).__name__
    return message.rpartition(">: ")[2].split("\n")[0][:200]  # asyncpg's messages follow "<class ...>: "
