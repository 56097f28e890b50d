"""Graceful shutdown: the first SIGTERM or SIGINT drains the server, the second ends the process at once."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.api.http.services import Services
from service.engine import orphan_guard
from service.lifecycle import Phase
from service.observability import logs

_log = logs.get(__name__)

FINAL_RESPONSES_S = 5
"""Seconds after the drain timeout in which running commits may finish and responses may be sent."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that shuts down gracefully at the first signal:

    1. /readyz answers 503. For `drain_delay_s` seconds calls are still served, so that load balancers notice.
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
        if services.lifecycle.unready_reason is None:
            await asyncio.sleep(self._drain_delay_s)
        services.lifecycle.enter(Phase.DRAINING)
        in_flight = set(self.server_state.tasks)
        _log.info("drain_started", num_requests=len(in_flight), timeout_s=self._drain_s)
        if in_flight:
            await asyncio.wait(in_flight, timeout=self._drain_s)
        num_aborted = await services.sessions.abort_acts()
        if num_aborted:
            _log.warning("drain_timeout_reached", num_acts=num_aborted)
        if in_flight:
            await asyncio.wait(in_flight, timeout=FINAL_RESPONSES_S)


def end(code: int) -> None:
    """Ends this process and the engine's processes at once, without waiting for threads."""
    orphan_guard.cut()
    os._exit(code)
