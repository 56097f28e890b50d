"""Graceful shutdown: what the first and the second SIGTERM or SIGINT do, and what happens to in-flight acts."""

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

LAST_ANSWERS_S = 5
"""Seconds for commits that have begun, and for answers to leave, once the acts' own time is over."""


class DrainingServer(uvicorn.Server):
    """At the first signal it is unready. After `drain_delay_s` seconds, in which what routes to it sees that, new acts
    are refused, by answers: the socket stays open while requests are in flight. They get `drain_s` seconds, then acts
    whose commit has not begun are aborted and their callers told. The second signal ends the process at once.

    The app's lifespan runs around it (`lifespan="off"`), so that what it raises reaches the caller of `run`.
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
            await asyncio.wait(in_flight, timeout=LAST_ANSWERS_S)
        self.should_exit = True


def end(code: int) -> None:
    """Ends this process now, and the engine's with it, whatever their threads are at."""
    orphan_guard.cut()
    os._exit(code)
