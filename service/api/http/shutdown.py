"""Graceful shutdown: the first SIGTERM or SIGINT drains the server, the second ends the process at once."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Generator
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.api.http.services import Services
from service.engine import orphan_guard
from service.lifecycle import Lifecycle, Phase
from service.observability import logs

_log = logs.get(__name__)

_QUIET_S = 1.0
"""Seconds without a call after which all load balancers have noticed that this replica is leaving."""
_NUM_POLLS = 5
"""Number of times that `_QUIET_S` is divided into, so that a process that was stalled meanwhile handles its backlog."""

FINAL_RESPONSES_S = 5
"""Seconds after the drain timeout in which running commits may finish and responses may be sent."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that shuts down gracefully at the first signal:

    1. /readyz answers 503. Calls are still served for `drain_delay_s` seconds, and then for as long as they arrive: a
       slow load balancer has not noticed yet. Each response closes its connection, so that no idle connection is left
       on which a call could arrive while the server closes it. Without a drain delay this phase is skipped.
    2. New acts, episodes and forks are refused with 503 `draining`. In-flight requests get `drain_s` seconds, the
       drain timeout.
    3. In-flight acts whose commit has not begun are aborted: their callers receive 503 `draining`.

    The second signal ends the process at once. The server itself runs the app's lifespan (configure `lifespan="off"`),
    so that exceptions of the lifespan reach the caller of `run`.
    """

    def __init__(self, config: uvicorn.Config, *, drain_delay_s: float, drain_s: float) -> None:
        super().__init__(config)
        self._drain_delay_s = drain_delay_s
        self._drain_s = drain_s
        self._draining: asyncio.Task[None] | None = None

    @property
    def _app(self) -> FastAPI:
        app: Any = self.config.app
        return app

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._app.router.lifespan_context(self._app):
            await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        yield

    def _on_signal(self, number: int) -> None:
        if self._draining:
            _log.warning("forced_exit", signal=signal.Signals(number).name)
            end(128 + number)
        self._draining = asyncio.create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        try:
            await self._finish_requests()
        finally:
            self.should_exit = True

    async def _finish_requests(self) -> None:
        services: Services = self._app.state.services
        services.lifecycle.enter(Phase.LEAVING)
        has_callers = services.lifecycle.unready_reason is None and self._drain_delay_s > 0
        if has_callers:
            await asyncio.sleep(self._drain_delay_s)
        deadline = time.monotonic() + self._drain_s
        if has_callers:
            await _until_quiet(services.lifecycle, deadline - self._drain_s / 2)
        services.lifecycle.enter(Phase.DRAINING)
        in_flight = set(self.server_state.tasks)
        left_s = max(deadline - time.monotonic(), 0.0)
        _log.info("drain_started", num_requests=len(in_flight), timeout_s=round(left_s, 3))
        if in_flight:
            await asyncio.wait(in_flight, timeout=left_s)
        num_aborted = await services.sessions.abort_acts()
        if num_aborted:
            _log.warning("drain_timeout_reached", num_acts=num_aborted)
        if in_flight:
            await asyncio.wait(in_flight, timeout=FINAL_RESPONSES_S)


async def _until_quiet(lifecycle: Lifecycle, deadline: float) -> None:
    """Waits until no call has arrived for `_QUIET_S` seconds, but at most until the deadline (of `time.monotonic`)."""
    num_calls, num_quiet = lifecycle.num_calls, 0
    while num_quiet < _NUM_POLLS and time.monotonic() < deadline:
        await asyncio.sleep(_QUIET_S / _NUM_POLLS)
        num_quiet = num_quiet + 1 if lifecycle.num_calls == num_calls else 0
        num_calls = lifecycle.num_calls


def end(code: int) -> None:
    """Ends this process and the engine's processes at once, without waiting for threads."""
    orphan_guard.cut()
    os._exit(code)
