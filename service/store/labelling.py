"""Fills the labels of episodes that an older version wrote, so that filters find them.

An older replica may run beside this version, and its statements do not know the newer columns. Therefore the work is
repeated: in the background, and before a query that filters by such a column.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from service.observability import logs
from service.store.base import StoreUnavailable
from service.store.schema import LABEL_COLUMNS, LABEL_VERSION, UNLABELLED, entries, entry_rows, episodes, labels
from service.validation import strict_json

_log = logs.get(__name__)

BATCH = 200
"""Maximum number of episodes in one transaction."""
_MAX_BATCHES = 10
"""Maximum number of transactions before a query. The background task labels the rest of a large store."""
_PAUSE_S = 60.0
"""Seconds between two searches for episodes that an older replica has written."""

_PENDING = (
    select(episodes.c.episode_id, episodes.c.request, episodes.c.deleted_at)
    .where(UNLABELLED)
    .order_by(episodes.c.episode_id)
)
_LABEL = (
    update(episodes)
    .where(episodes.c.episode_id == bindparam("id"))
    .values({name: bindparam(name) for name in (*(column.name for column in LABEL_COLUMNS.values()), "label_version")})
)


def is_pending(connection: Connection) -> bool:
    """Returns whether an episode needs labels."""
    return connection.execute(_PENDING.limit(1)).first() is not None


def label_batch(connection: Connection) -> int:
    """Labels the next episodes, and removes the labels of tombstones. Returns their number.

    If another replica is labelling the same episodes, this waits, and labels none of them.
    """
    found = connection.execute(_PENDING.limit(BATCH).with_for_update()).all()
    if not found:
        return 0
    requests = {row.episode_id: strict_json.load(row.request) if row.deleted_at is None else None for row in found}
    connection.execute(delete(entries).where(entries.c.episode_id.in_(requests)))
    columns = [
        {"id": name, **labels(request or {}), "label_version": None if request is None else LABEL_VERSION}
        for name, request in requests.items()
    ]
    connection.execute(_LABEL, columns)
    if rows := [row for name, request in requests.items() for row in entry_rows(name, request or {})]:
        connection.execute(insert(entries), rows)
    return len(found)


class Labelling:
    """Labels the episodes of a store: in a background task, and before a query.

    read, write: run a function in a transaction.
    """

    def __init__(self, read: Callable[[Any], Awaitable[Any]], write: Callable[[Any], Awaitable[Any]]) -> None:
        self._read = read
        self._write = write
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="labelling")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def catch_up(self) -> None:
        """Labels the episodes that need it, up to a maximum number. Raises StoreUnavailable."""
        for _ in range(_MAX_BATCHES):
            if not await self._read(is_pending):
                return
            await self._write(label_batch)

    async def _run(self) -> None:
        while True:
            try:
                num_labelled = 0
                while await self._read(is_pending) and (num := await self._write(label_batch)):
                    num_labelled += num
                if num_labelled:
                    _log.info("episodes_labelled", num_episodes=num_labelled)
            except StoreUnavailable as error:
                _log.warning("labelling_delayed", reason=str(error))
            except Exception as error:  # noqa: BLE001 - the task must go on, and filters work without it
                _log.error("labelling_failed", exc_info=error)
            await asyncio.sleep(_PAUSE_S)
