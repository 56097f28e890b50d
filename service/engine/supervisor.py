"""Owns the engine's lifetime: loads it, serves it, watches it, and loads it again after it died, in this process.

Episodes outlive the engine: their token logs are here and in the store, and the next engine goes on from them.
"""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from service.agent.policies import Policies
from service.engine import watchdog
from service.engine.base import Engine, EngineRefused
from service.observability import logs, metrics
from service.sessions.sessions import Sessions
from service.settings import Settings

_log = logs.get(__name__)

Load = Callable[[], Awaitable[Engine]]
Heard = Callable[[], None]

_LONGEST_BACKOFF_S = 60.0


class Supervisor:
    """Keeps an engine behind the sessions.

    It gives up when the first engine cannot be loaded or served, since no later one could, and after
    `engine_max_failures` failures within `engine_failure_window_s`: then whoever started the process has to act.
    """

    def __init__(self, load: Load, sessions: Sessions, settings: Settings, on_ready: Heard, on_fatal: Heard) -> None:
        self._load = load
        self._sessions = sessions
        self._settings = settings
        self._on_ready, self._on_fatal = on_ready, on_fatal
        self._failures: deque[float] = deque()
        self._has_served = False
        self.loading = False
        """Stays true where `run` was cancelled amid a load, which goes on in its thread."""

    async def run(self) -> None:
        """Runs one engine after the other until it gives up."""
        while True:
            await self._live()
            if self._sessions.draining:
                return  # there is nobody to serve any more
            metrics.ENGINE_FAILURES.inc()
            num_failures = self._num_recent_failures()
            if not self._has_served or num_failures >= self._settings.engine_max_failures:
                _log.critical("no engine: giving up", num_failures=num_failures)
                self._on_fatal()
                return
            pause_s = min(self._settings.engine_backoff_s * 2 ** (num_failures - 1), _LONGEST_BACKOFF_S)
            _log.warning("the engine will be loaded again", num_failures=num_failures, in_s=pause_s)
            await asyncio.sleep(pause_s)

    def _num_recent_failures(self) -> int:
        """Those of the window, the one that happened now included."""
        now = time.monotonic()
        self._failures.append(now)
        while self._failures[0] <= now - self._settings.engine_failure_window_s:
            self._failures.popleft()
        return max(len(self._failures), 1)

    async def _live(self) -> None:
        """One engine's life, from its load to its end, whatever ends it."""
        self.loading = True
        try:
            engine = await self._load()
        except EngineRefused as refusal:
            _log.critical("the engine cannot be loaded", model=self._settings.model, reason=str(refusal))
            return
        except Exception:  # noqa: BLE001 - whatever it is, the next attempt or the end of the process follows
            _log.exception("the engine cannot be loaded", model=self._settings.model)
            return
        self.loading = False
        try:
            await self._serve(engine)
        except Exception:  # noqa: BLE001 - as above
            _log.exception("the engine cannot be served", model=self._settings.model)
        finally:
            await engine.close()

    async def _serve(self, engine: Engine) -> None:
        """Returns when the engine has died."""
        watching = asyncio.create_task(self._watch(engine), name="watch")
        sweeping = None
        try:
            await self._begin(engine)
            sweeping = asyncio.create_task(self._sessions.sweeper.run(), name="sweeper")
            await watching
        finally:
            await stop(watching, sweeping)

    async def _begin(self, engine: Engine) -> None:
        settings = self._settings
        policies = Policies(engine, self._sessions.store, source=settings.adapters, kept=settings.data / "adapters")
        await policies.restore()
        report = self._sessions.serve(engine, policies)
        self._has_served = True
        self._on_ready()
        _log.info("ready", policy=engine.info.model, policy_version=engine.info.version, **dataclasses.asdict(report))
        if not report.append_only:
            _log.warning("the chat template rewrites earlier turns; episodes keep them as the policy saw them")
        if not report.canonical:
            _log.warning("the chat template's own tokenization differs from the episode's")

    async def _watch(self, engine: Engine) -> None:
        """Returns when the engine has died, of itself or because it hung."""
        dying = asyncio.create_task(engine.watch(), name="death")
        hanging = asyncio.create_task(watchdog.hung(engine, self._settings.engine_canary_s), name="hang")
        try:
            await asyncio.wait([dying, hanging], return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                _log.critical("the engine died")
                return
            _log.critical("the engine hangs", silent_s=self._settings.engine_canary_s)
            engine.kill()
        finally:
            await stop(dying, hanging)


async def stop(*tasks: "asyncio.Task[Any] | None") -> None:
    """Cancels tasks and waits for their end; None stands for one that never began."""
    begun = [task for task in tasks if task]
    for task in begun:
        task.cancel()
    await asyncio.gather(*begun, return_exceptions=True)
