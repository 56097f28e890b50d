"""Owns the seam below the store: how a transaction is run. The statements are the same for both databases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sqlalchemy import Connection

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds to wait for a lock that another process holds, for a whole transaction, and at the start for a server."""

    lock_s: float = 10.0
    transaction_s: float = 15.0
    start_s: float = 30.0


class Connections(Protocol):
    """One database. A transaction is a function of a connection, and takes place as a whole or not at all."""

    async def open(self, revision: str = "head") -> None:
        """Brings the schema to a revision, by default the newest, without which nothing but `close` may follow. Raises
        StoreRefused."""
        ...

    async def close(self) -> None: ...

    async def read(self, function: Callable[[Connection], _T]) -> _T:
        """What the function reads, all of it as it was at one moment. Raises StoreUnavailable."""
        ...

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        """Commits what the function writes. Raises IntegrityError and what the function raises, and then nothing was
        written; or StoreUnavailable, and then it may have been."""
        ...


def reason(error: BaseException) -> str:
    """The database's own words, without the statement and its parameters."""
    said = str(getattr(error, "orig", None) or error) or type(error).__name__
    return said.rpartition(">: ")[2].split("\n")[0][:200]  # asyncpg's come behind the name of their class
