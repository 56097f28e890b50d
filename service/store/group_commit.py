"""Group commit: changes that arrive while a commit is being written share the next commit."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from service.store.base import Change, StoreUnavailable

Write = Callable[[Sequence[Change]], Awaitable[Sequence[Exception | None]]]
"""Writes changes in one transaction. Returns one item for each change: None, or why it was refused."""

OnCommit = Callable[[int, float], None]
"""Called after each commit with the number of its changes and its duration in seconds."""

MAX_BATCH = 256
"""Maximum number of changes in one commit."""


class GroupCommit:
    """Writes submitted changes in batches. One background task writes one batch at a time."""

    def __init__(self, write: Write, on_commit: OnCommit) -> None:
        self._write = write
        self._on_commit = on_commit
        self._pending: list[tuple[Change, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="group-commit")

    async def stop(self) -> None:
        """Writes the pending changes, then ends the background task."""
        if self._task is None:
            return
        self._is_stopping = True
        self._wake.set()
        await asyncio.gather(self._task, return_exceptions=True)

    async def submit(self, change: Change) -> None:
        """Submits a change and waits until it is durable.

        Raises the reason if the change is refused, or StoreUnavailable. If the caller is cancelled, the change is
        written nevertheless.
        """
        if self._task is None or self._task.done():
            raise StoreUnavailable("the store is closed")
        done = asyncio.get_running_loop().create_future()
        self._pending.append((change, done))
        self._wake.set()
        await done

    async def _run(self) -> None:
        while self._pending or not self._is_stopping:
            await self._wake.wait()
            batch = self._pending[:MAX_BATCH]
            if not batch:
                self._wake.clear()
                continue
            await self._write_batch(batch)
            del self._pending[: len(batch)]

    async def _write_batch(self, batch: "list[tuple[Change, asyncio.Future[None]]]") -> None:
        started = time.perf_counter()
        try:
            results = await self._write([change for change, _ in batch])
            self._on_commit(len(batch), time.perf_counter() - started)
        except Exception as error:  # noqa: BLE001 - every waiting act must get the error, and the task must continue
            results = [error] * len(batch)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            results = [StoreUnavailable("the database's driver has cancelled the commit")] * len(batch)
        for (_, done), error in zip(batch, results, strict=True):
            if done.done():  # the caller was cancelled
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
