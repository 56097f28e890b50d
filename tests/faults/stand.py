"""Owns what is hurt, servers and their database, and each way of hurting it. Every strike ends with all of it up."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import psutil

from tests.e2e.server import START_LIMIT_S, Server
from tests.support.postgres import Postgres

FaultKind = Literal["server", "engine", "postgres", "replicas"]

SETTINGS = {"engine_canary_s": "6", "engine_failure_window_s": "1"}
"""A server that soon sees that its engine hangs, and takes each failure for the first: it never gives up."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Servers on one store, and their database where that is PostgreSQL."""

    servers: Sequence[Server]
    database: Postgres | None = None
    api_key: str | None = None

    def start(self) -> "Stand":
        """Starts what is not up, all at once."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(restore, self.servers))
        return self

    def kill(self) -> None:
        for server in self.servers:
            if server.process is not None and server.process.poll() is None:
                server.kill()

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]


def kill_server(stand: Stand, generator: random.Random) -> str:
    """kill -9 of a server and all that it started; then it starts again on what it kept."""
    server = generator.choice(stand.servers)
    server.kill()
    server.start()
    return "kill -9 of the server"


def hurt_engine(stand: Stand, generator: random.Random) -> str:
    """kill -9 of the engine's process; or it stops, for a while or until the server gives it up."""
    server = generator.choice(stand.servers)
    engine = engine_of(server)
    how = generator.choices(["killed", "stopped for a while", "stopped for ever"], [6, 1, 1])[0]
    engine.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    if how == "stopped for a while":
        time.sleep(generator.uniform(0.5, 4.0))
        engine.send_signal(signal.SIGCONT)
    else:
        engine.wait(START_LIMIT_S)
    restore(server)
    return f"the engine {how}"


def restart_database(stand: Stand, generator: random.Random) -> str:
    """PostgreSQL stops at once, as in a crash, and is away for a while."""
    assert stand.database is not None
    stand.database.stop("immediate")
    time.sleep(generator.uniform(0.0, 2.0))
    stand.database.start()
    return "PostgreSQL restarted, mode immediate"


Strike = Callable[[Any, random.Random], str]
"""Hurts a stand, and says how; the stand is up when it returns."""

STRIKES: dict[str, Strike] = {
    "server": kill_server,
    "engine": hurt_engine,
    "postgres": restart_database,
    "replicas": kill_server,
}


def engine_of(server: Server) -> psutil.Process:
    """The process that holds the policy."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def restore(server: Server) -> None:
    """Returns once the server is ready: by itself, or started again if its process has ended."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process is None or server.process.poll() is not None:
            server.start()
            return
        if _is_ready(server) and _has_engine(server):
            return
        time.sleep(0.1)
    raise AssertionError(f"not ready again: {server.log[-3000:]}")


def _is_ready(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _has_engine(server: Server) -> bool:
    """Readiness may be a moment old: the engine that was killed is not there any more, and the next one is not yet."""
    try:
        return engine_of(server).status() != psutil.STATUS_ZOMBIE
    except (StopIteration, psutil.NoSuchProcess):
        return False
