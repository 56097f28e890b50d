"""Lets the packaged policy learn a game that it was not trained for, slippery FrozenLake: `make learn`.

It first plays the games that it has mastered. Training rehearses these episodes, or it would forget the games.

Without EPISODIC_URL, starts a service for it on a free port, and stops the service at the end.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import httpx
import typer

from service.loop.training import end_with_parent

LESSON = (
    *("--env", "FrozenLake-v1", "--env-kwargs", '{"reward_schedule": [1, -1, 0]}'),
    *("--instructions", "The ice is slippery: a move may slip sideways. Actions: left, down, right, up."),
    *("--test-kwargs", "{}", "--method", "grpo", "--learning-rate", "3e-3"),
    *("--episodes", "512", "--repeat", "1", "--selection", "80", "--final", "500"),
    *("--train-args", "--group-by start --discount 0.8 --warmup-steps 0 --clip 0.4"),
)
"""The options of `episodic learn`. `--rehearse` is added to the last."""

WHOLE_LESSON, FIRST_TEMPERATURE, LAST_TEMPERATURE = 12, 8.0, 4.0
"""Rounds of the whole lesson, and the temperatures of the first and the last one. It falls by the same amount each
round, also if there are fewer or more."""

MASTERED = {"episodic/FrozenLakeRandom-v0": 256, "CliffWalking-v1": 32, "Taxi-v4": 64, "Blackjack-v1": 64}
"""Number of episodes of each game to rehearse."""

INTERRUPTED = 130
"""The exit code of `episodic learn` after Ctrl+C."""

_START_S = 300.0


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run. The same command continues it.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds. The whole lesson has 12; 5 take about ten minutes.")] = 5,
) -> None:
    """Run the lesson, and end with its exit code."""
    out.mkdir(parents=True, exist_ok=True)
    with running_service(out) as url:
        raise typer.Exit(_learn(out, url, rounds))


def schedule(rounds: int) -> tuple[str, ...]:
    """The options for so many rounds of the lesson."""
    fall = (FIRST_TEMPERATURE - LAST_TEMPERATURE) / (WHOLE_LESSON - 1)
    last = max(FIRST_TEMPERATURE - fall * (rounds - 1), 1.0)
    temperatures = ("--temperature", f"{FIRST_TEMPERATURE:g}", "--last-temperature", f"{last:.3g}")
    return ("--rounds", str(rounds), "--patience", str(rounds), *temperatures)


def rehearsal(out: Path, url: str) -> Path:
    """Lets the policy play the games that it has mastered, and returns the export."""
    file, tag = out / "mastered.ndjson", f"mastered-{uuid4().hex[:8]}"
    if file.exists():
        return file
    for env, count in MASTERED.items():
        typer.echo(f"Playing {count} episodes of {env}, to rehearse them.", err=True)
        options = ("--episodes", str(count), "--temperature", "1", "--concurrency", "64", "--tag", tag)
        episodic("rollout", "--url", url, "--env", env, *options, shows_report=False)
    episodic("export", "--url", url, "--tag", tag, "--format", "tokens", "--output", str(file))
    return file


def episodic(*arguments: str, shows_report: bool = True) -> None:
    """Runs an `episodic` command, and ends with its exit code if it fails. The report is what it prints to stdout."""
    stdout = None if shows_report else subprocess.DEVNULL
    code = subprocess.run(_command(*arguments), check=False, stdout=stdout).returncode  # noqa: S603
    if code:
        raise typer.Exit(code)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service", *arguments]


def _learn(out: Path, url: str, rounds: int) -> int:
    """Runs `episodic learn`. Ctrl+C reaches it directly, because it is in the same process group."""
    *lesson, train_args = LESSON
    train_args += f" --rehearse {shlex.quote(str(rehearsal(out, url)))}"
    command = _command("learn", "--out", str(out), "--url", url, *schedule(rounds), *lesson, train_args)
    signal.signal(signal.SIGINT, lambda *_: None)
    code = subprocess.run(command, check=False, preexec_fn=end_with_parent).returncode  # noqa: S603
    if code == INTERRUPTED:
        typer.echo("If `make learn` started the service, `make learn` also continues the run.", err=True)
    return code


@contextmanager
def running_service(out: Path) -> Iterator[str]:
    """The URL of a service: EPISODIC_URL, or one that serves the packaged policy while the block runs.

    The store and the log of the latter are in the folder of the run.
    """
    if url := os.environ.get("EPISODIC_URL"):
        yield url
        return
    with _started(out) as url:
        yield url


@contextmanager
def _started(out: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    adapters, url = out / "adapters", f"http://127.0.0.1:{port}"
    adapters.mkdir(exist_ok=True)
    own = {"EPISODIC_PORT": str(port), "EPISODIC_DATA": str(out / "data"), "EPISODIC_ADAPTERS": str(adapters)}
    typer.echo(f"Starting a service at {url}. Its log is {out / 'server.log'}.", err=True)
    with (out / "server.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            env={**os.environ, **own},
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it only makes a system call
        )
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
