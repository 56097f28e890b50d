"""Runs a real `episodic serve` process, with the packaged policy on vLLM on the CPU."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

START_LIMIT_S = 240.0


class Server:
    """A server on a fixed port with its data in `folder`, one process at a time.

    Starting it again after `kill` uses the same data. `settings` are set as EPISODIC_* variables.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("EPISODIC_")}
        named = {f"EPISODIC_{name.upper()}": value for name, value in settings.items()}
        # As on a machine without a C++ compiler and with an empty cache.
        bare = {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        where = {"EPISODIC_PORT": str(self.port), "EPISODIC_DATA": str(folder / "data")}
        self._environment = {**inherited, **bare, **where, **named}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text(errors="replace")

    @property
    def is_ready(self) -> bool:
        try:  # without `verify`, because each call would read all certificates
            return httpx.get(f"{self.url}/readyz", timeout=5, verify=False).status_code == 200  # noqa: S501
        except httpx.TransportError:
            return False

    def launch(self) -> "Server":
        """Starts the process, and returns at once."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "serve.log").open("ab") as log:
            command = [sys.executable, "-m", "service", "serve"]
            self.process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def start(self) -> "Server":
        """Starts the process, and waits until it is ready."""
        self.launch()
        assert self.process is not None
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log[-3000:]
            if self.is_ready:
                return self
            time.sleep(0.2)
        raise AssertionError(f"the server was not ready after {START_LIMIT_S:g} s: {self.log[-3000:]}")

    def make_key(self, tenant: str) -> str:
        """Creates an API key with `episodic keys create`. From then on, the server requires a key."""
        command = [sys.executable, "-m", "service", "keys", "create", "--tenant", tenant]
        made = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True)
        return made.stdout.strip()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        """Sends SIGKILL to the server and its child processes, as if the machine crashed."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def stop(self) -> int:
        """Shuts the server down gracefully. Returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()


def until(condition: Callable[[], Any]) -> None:
    """Waits until the condition is true, at most two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _free_port() -> int:
    """Returns a free port below the ephemeral range, so that it stays free while the server is down."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
