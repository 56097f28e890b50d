"""Owns the sharing of commits: what arrives while one commit is on its way to the disk goes into the next."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from service.store.base import Change, StoreUnavailable

Write = Callable[[Sequence[Change]], Awaitable[Sequence[Exception | None]]]
"""Writes the changes in one transaction, and says of each what it was refused for."""

OnCommit = Callable[[int, float], None]
"""Told of each shared commit: how many changes it held, and the seconds it took."""

MAX_BATCH = 256


class GroupCommit:
    """Writes submitted commits in batches, one batch at a time, by one background task."""

    def __init__(self, write: Write, on_commit: OnCommit) -> None:
        self._write = write
        self._on_commit = on_commit
        self._pending: list[tuple[Change, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="group-commit")

    async def stop(self) -> None:
        """Writes what is pending, then ends."""
        if self._task is None:
            return
        await asyncio.gather(*(done for _, done in self._pending), return_exceptions=True)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def submit(self, change: Change) -> None:
        """Returns once the change is durable; raises what it was refused for, or StoreUnavailable. Cannot be cancelled
        half-way: a caller that goes away leaves the change to be written."""
        if self._task is None or self._task.done():
            raise StoreUnavailable("the store is closed")
        done = asyncio.get_running_loop().create_future()
        self._pending.append((change, done))
        self._wake.set()
        await asyncio.shield(done)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            batch = self._pending[:MAX_BATCH]
            if not batch:
                self._wake.clear()
                continue
            await self._write_batch(batch)
            del self._pending[: len(batch)]

    async def _write_batch(self, batch: "list[tuple[Change, asyncio.Future[None]]]") -> None:
        began = time.perf_counter()
        try:
            results = await self._write([change for change, _ in batch])
        except Exception as error:  # noqa: BLE001 - each waiting act must hear of it, and the writer must live on
            results = [error if isinstance(error, StoreUnavailable) else StoreUnavailable(repr(error))] * len(batch)
        else:
            self._on_commit(len(batch), time.perf_counter() - began)
        for (_, done), error in zip(batch, results, strict=True):
            if done.done():
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
