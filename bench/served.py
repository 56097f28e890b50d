"""Starts a service process for a measurement: the packaged policy on a free port, with a temporary data folder."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from service.settings import Settings

_START_LIMIT_S = 300.0


@contextmanager
def served(data: Path | None = None, *, scripted: bool = False, **settings: str) -> Generator[str]:
    """Starts a service, waits until it is ready, and yields its URL.

    `data` is its data folder, by default a temporary one. With `scripted`, its engine costs next to nothing. `settings`
    are settings by name, for example max_queued_acts. Raises RuntimeError with the end of the service's log if it does
    not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environment = {**os.environ, "EPISODIC_PORT": str(port), "EPISODIC_DATA": str(data or folder)}
        environment |= {f"EPISODIC_{name.upper()}": value for name, value in settings.items()}
        with log.open("wb") as out:
            arguments = ["bench.scripted", Settings().model_path, str(port), str(data or folder)]
            command = [sys.executable, "-m", *(arguments if scripted else ("service", "serve"))]
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError("the service did not start. The end of its log:\n" + log.read_text(errors="replace")[-2000:])


def server_of(url: str) -> psutil.Process:
    """The process that listens at this URL. It must be a descendant of this process."""
    port = int(url.rpartition(":")[2])
    for child in psutil.Process().children(recursive=True):
        if any(at.laddr.port == port and at.status == psutil.CONN_LISTEN for at in child.net_connections("tcp")):
            return child
    raise RuntimeError(f"no descendant of this process listens on port {port}")
