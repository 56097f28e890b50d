"""Lets the packaged policy learn a game that it was not trained for, slippery FrozenLake: `make learn`.

Without EPISODIC_URL, starts a service for it on a free port, and stops the service at the end.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer

LESSON = (
    *("--env", "FrozenLake-v1", "--env-kwargs", '{"reward_schedule": [1, -1, 0]}'),
    *("--test-kwargs", "{}", "--method", "grpo", "--rounds", "6", "--patience", "4", "--temperature", "8"),
    *("--episodes", "128", "--repeat", "8", "--selection", "80", "--final", "500"),
    *("--train-args", "--discount 0.8 --learning-rate 2e-3 --warmup-steps 2"),
)
"""The options of `episodic learn`."""

_START_S = 300.0


def main(out: Annotated[Path, typer.Option(help="Folder of the run. The same command continues it.")]) -> None:
    """Run the lesson, and end with its exit code."""
    out.mkdir(parents=True, exist_ok=True)
    url = os.environ.get("EPISODIC_URL")
    if url:
        raise typer.Exit(_learn(out, url))
    with _service(out) as started:
        raise typer.Exit(_learn(out, started))


def _learn(out: Path, url: str) -> int:
    command = [sys.executable, "-m", "service", "learn", "--out", str(out), "--url", url, *LESSON]
    return subprocess.run(command, check=False).returncode  # noqa: S603


@contextmanager
def _service(out: Path) -> Iterator[str]:
    """Serves the packaged policy while the block runs. Its store and its log are in the folder of the run."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    adapters, url = out / "adapters", f"http://127.0.0.1:{port}"
    adapters.mkdir(exist_ok=True)
    own = {"EPISODIC_PORT": str(port), "EPISODIC_DATA": str(out / "data"), "EPISODIC_ADAPTERS": str(adapters)}
    typer.echo(f"Starting a service at {url}. Its log is {out / 'server.log'}.", err=True)
    with (out / "server.log").open("a") as log:
        command = [sys.executable, "-m", "service", "serve"]
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)  # noqa: S603
    try:
        _wait(process, url, out / "server.log")
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    typer.echo(f"The service did not start. The end of {log} says why.", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
