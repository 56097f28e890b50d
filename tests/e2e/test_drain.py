"""SIGTERM and SIGINT while the real engine serves acts: in-flight acts, later acts, and the exit of the process."""

import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import Server, until

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers, and kills them at the end of the test."""
    started: list[Server] = []

    def begin(folder: Path, *, ready: bool = True, **settings: str) -> Server:
        server = Server(folder, **settings)
        started.append(server)
        return server.start() if ready else server.launch()

    yield begin
    for server in started:
        if server.process and server.process.poll() is None:
            server.kill()


def open_long(server: Server, name: str, max_tokens: int = 2000) -> None:
    """Creates an episode whose acts take a few seconds: the character that ends the text is never the most likely."""
    space = {"type": "regex", "pattern": "[a-z]+~"}
    body = {"episode_id": name, "action_space": space, "sampling": {"max_tokens": max_tokens, "temperature": 0.0}}
    opened = httpx.post(f"{server.url}/episode", json=body, timeout=120)
    assert opened.status_code == 201, opened.text


def act(server: Server, name: str, headers: Any = None) -> httpx.Response:
    body = {"episode_id": name, "observation": "row 0", "step": 0}
    return httpx.post(f"{server.url}/act", json=body, headers=headers, timeout=120)


def num_running(server: Server) -> int:
    """Returns the number of in-flight acts."""
    # Without `verify`, because each call would read all certificates, and a fast engine has ended the act by then.
    lines = httpx.get(f"{server.url}/metrics", verify=False).text.splitlines()  # noqa: S501
    return int(float(next(line for line in lines if line.startswith("agent_active_acts ")).split()[1]))


def children(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    return psutil.Process(server.process.pid).children(recursive=True)


def num_steps(server: Server) -> dict[str, int]:
    """Returns the number of committed steps by episode."""
    with contextlib.closing(sqlite3.connect(server.folder / "data" / "episodic.db")) as connection:
        return dict(connection.execute("SELECT episode_id, step FROM episodes"))


def code(answer: httpx.Response) -> tuple[int, str | None]:
    """Returns the status and the problem code."""
    return answer.status_code, answer.json().get("code")


def test_act_in_flight_completes_and_new_acts_get_503(
    start: Callable[..., Server], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    server = start(tmp_path, drain_s="120")
    for name in ("long", "late"):
        open_long(server, name)
    long: Future[httpx.Response] = threads.submit(act, server, "long")
    until(lambda: num_running(server) == 1)
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGINT)  # like Ctrl-C in a terminal, which the engine's process also receives
    until(lambda: code(httpx.get(f"{server.url}/readyz")) == (503, None))
    assert code(act(server, "late")) == (503, "draining")
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert not long.done()
    assert long.result().json()["step"] == 0
    assert server.wait() == 0
    assert num_steps(server) == {"long": 1, "late": 0}


def test_drain_timeout_aborts_acts(start: Callable[..., Server], tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    server = start(tmp_path, drain_s="0.1", drain_delay_s="0.5")
    for name in ("cut", "cut-stream"):
        open_long(server, name)
    calls = [threads.submit(act, server, "cut"), threads.submit(act, server, "cut-stream", STREAM)]
    until(lambda: num_running(server) == 2)
    server.signal(signal.SIGTERM)
    assert code(calls[0].result()) == (503, "draining")
    streamed = calls[1].result()
    assert "draining" in streamed.text
    assert (streamed.status_code == 503) or "event: error" in streamed.text
    assert server.wait() == 0
    assert num_steps(server) == {"cut": 0, "cut-stream": 0}


def test_second_signal_exits_immediately(
    start: Callable[..., Server], tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    """Also during the delay before the drain, in which acts are still served."""
    server = start(tmp_path, drain_delay_s="600")
    open_long(server, "done", max_tokens=10)
    open_long(server, "cut")
    started = children(server)
    server.signal(signal.SIGTERM)
    until(lambda: code(httpx.get(f"{server.url}/readyz")) == (503, None))
    assert act(server, "done").json()["step"] == 0
    call = threads.submit(act, server, "cut")
    until(lambda: num_running(server) == 1)
    server.signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT
    assert isinstance(call.exception(), httpx.TransportError)
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []
    assert num_steps(server) == {"done": 1, "cut": 0}


@pytest.mark.parametrize("event", ["engine_loading", "engine_starting"])
def test_sigterm_while_the_model_loads(start: Callable[..., Server], tmp_path: Path, event: str) -> None:
    server = start(tmp_path, ready=False)
    until(lambda: event in server.log)
    if event == "engine_starting":
        until(lambda: children(server))
    started = children(server)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []


def test_invalid_store_exits_with_one_line(start: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "data" / "episodic.db"
    file.parent.mkdir()
    file.write_bytes(b"no database" * 100)
    server = start(tmp_path, ready=False)
    assert server.wait() == 2
    assert str(file) in server.log
    assert "Traceback" not in server.log


def test_unloadable_engine_exits_with_one_line(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(tmp_path, ready=False, engine__max_model_length="5")
    assert server.wait() == 1
    assert "did you mean EPISODIC_ENGINE__MAX_MODEL_LEN?" in server.log
    assert "Traceback" not in server.log
