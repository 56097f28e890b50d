"""The supervisor: loads the engine, monitors it, and loads it again in the same process if it dies.

Episodes do not depend on the engine: their histories are in memory and in the store, and the next engine uses them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from service.engine import watchdog
from service.engine.base import Engine, EngineRefused
from service.lifecycle import Lifecycle
from service.observability import logs, metrics
from service.settings import Settings

_log = logs.get(__name__)

Load = Callable[[], Awaitable[Engine]]
Serving = Callable[[Engine], AbstractAsyncContextManager[None]]
"""Returns a context manager. While it is open, the engine decides acts."""
Callback = Callable[[], None]

_LONGEST_BACKOFF_S = 60.0
_CLOSE_S = 60.0
"""Maximum duration of closing an engine. After that the supervisor fails, which ends the process."""


class Supervisor:
    """Provides the service with an engine, and replaces an engine that died or hung.

    It gives up, and calls `on_fatal`, in two cases: the first engine cannot be loaded or cannot serve, because a retry
    would fail too; or there were `engine_max_failures` failures within `engine_failure_window_s` seconds.
    """

    def __init__(
        self, load: Load, serving: Serving, lifecycle: Lifecycle, settings: Settings, on_fatal: Callback
    ) -> None:
        self._load = load
        self._serving = serving
        self._lifecycle = lifecycle
        self._settings = settings
        self._on_fatal = on_fatal
        self._failures: deque[float] = deque()

    async def run(self) -> None:
        """Runs one engine after the other, until the service drains or the supervisor gives up."""
        while True:
            await self._run_engine()
            if self._lifecycle.is_draining:
                return  # no acts are left for another engine
            metrics.ENGINE_FAILURES.inc()
            num_failures = self._num_recent_failures()
            if not self._lifecycle.has_served or num_failures >= self._settings.engine_max_failures:
                _log.critical("engine_gave_up", num_failures=num_failures)
                self._on_fatal()
                return
            pause_s = min(self._settings.engine_backoff_s * 2 ** (num_failures - 1), _LONGEST_BACKOFF_S)
            _log.warning("engine_reload_scheduled", num_failures=num_failures, pause_s=pause_s)
            await asyncio.sleep(pause_s)

    def _num_recent_failures(self) -> int:
        """Records a failure. Returns the number of failures within the window, including this one."""
        now = time.monotonic()
        self._failures.append(now)
        while self._failures[0] <= now - self._settings.engine_failure_window_s:
            self._failures.popleft()
        return max(len(self._failures), 1)

    async def _run_engine(self) -> None:
        """Loads one engine and serves it until it dies or fails."""
        self._lifecycle.is_loading_engine = True
        engine = await self._loaded()
        self._lifecycle.is_loading_engine = False  # not if this is cancelled, because the thread continues to load
        if engine is None:
            return
        try:
            await self._serve(engine)
        except Exception:  # noqa: BLE001 - `run` handles every failure
            _log.exception("engine_serve_failed", model=self._settings.model)
        finally:
            async with asyncio.timeout(_CLOSE_S):  # otherwise the service would never be ready again
                await engine.close()

    async def _loaded(self) -> Engine | None:
        """Loads an engine. Returns None if that fails."""
        try:
            return await self._load()
        except EngineRefused as refusal:
            _log.critical("engine_load_failed", model=self._settings.model, reason=str(refusal))
        except Exception:  # noqa: BLE001 - `run` handles every failure: it retries or gives up
            _log.exception("engine_load_failed", model=self._settings.model)
        return None

    async def _serve(self, engine: Engine) -> None:
        """Serves the engine until it dies."""
        watching = asyncio.create_task(self._watch(engine), name="watch")
        try:
            async with self._serving(engine):
                await watching
        finally:
            await stop(watching)

    async def _watch(self, engine: Engine) -> None:
        """Waits until the engine has died. Kills an engine that hangs. Raises what prevents it from being watched."""
        dying = asyncio.create_task(engine.watch(), name="death")
        hanging = asyncio.create_task(watchdog.hung(engine, self._settings.engine_canary_s), name="hang")
        try:
            await asyncio.wait([dying, hanging], return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                dying.result()
                _log.critical("engine_died")
                return
            hanging.result()
            _log.critical("engine_hung", silent_s=self._settings.engine_canary_s)
            engine.kill()
        finally:
            await stop(dying, hanging)


async def stop(*tasks: "asyncio.Task[Any]") -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
