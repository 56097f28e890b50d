"""The servers under test, their database, and the faults to inject. After each fault, everything is up again."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from tests.e2e.server import START_LIMIT_S, Server
from tests.support.postgres import Postgres

FaultKind = Literal["server", "engine", "postgres", "replicas"]

SETTINGS = {"engine_canary_s": "6", "engine_failure_window_s": "1"}
"""The server notices quickly that its engine hangs. It counts no earlier failures, so it always reloads the engine."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Servers that share one store, and the database if the store is PostgreSQL."""

    servers: Sequence[Server]
    database: Postgres | None = None
    api_key: str | None = None

    def start(self) -> "Stand":
        """Starts all servers that are not up, in parallel."""
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
    """Kills a server and its child processes with SIGKILL, and starts it again with the same data."""
    server = generator.choice(stand.servers)
    server.kill()
    server.start()
    return "kill -9 of the server"


def hurt_engine(stand: Stand, generator: random.Random) -> str:
    """Kills the engine's process, or stops it: for a while, or until the server replaces it."""
    server = generator.choice(stand.servers)
    engine = engine_of(server)
    how = generator.choices(["killed", "stopped for a while", "stopped until the server replaced it"], [6, 1, 1])[0]
    engine.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    if how == "stopped for a while":
        time.sleep(generator.uniform(0.5, 4.0))
        engine.send_signal(signal.SIGCONT)
    else:
        engine.wait(START_LIMIT_S)
    restore(server)
    return f"the engine was {how}"


def restart_database(stand: Stand, generator: random.Random) -> str:
    """Crashes PostgreSQL, and starts it again after a moment."""
    assert stand.database is not None
    stand.database.stop("immediate")
    time.sleep(generator.uniform(0.0, 2.0))
    stand.database.start()
    return "crash and restart of PostgreSQL"


Strike = Callable[[Any, random.Random], str]
"""Injects a fault into a stand, and returns a description of it. All servers are up again when it returns."""

STRIKES: dict[str, Strike] = {
    "server": kill_server,
    "engine": hurt_engine,
    "postgres": restart_database,
    "replicas": kill_server,
}


def engine_of(server: Server) -> psutil.Process:
    """Returns the engine's process."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def restore(server: Server) -> None:
    """Waits until the server is ready. Starts it if its process has ended."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process is None or server.process.poll() is not None:
            server.start()
            return
        if server.is_ready and _has_engine(server):
            return
        time.sleep(0.1)
    raise AssertionError(f"the server was not ready again after {START_LIMIT_S:g} s: {server.log[-3000:]}")


def _has_engine(server: Server) -> bool:
    """Whether the engine's process runs. For a moment after the engine was killed, /readyz may still report ready."""
    try:
        return engine_of(server).status() != psutil.STATUS_ZOMBIE
    except (StopIteration, psutil.NoSuchProcess):
        return False
