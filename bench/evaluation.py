"""Measures GET /evaluation with many stored episodes: its duration, the memory of the service, and acts meanwhile.

The engine is scripted. PostgreSQL is started from the wheel that the tests use.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import psutil
import typer
import uvloop
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from bench.contenders import ROOT
from bench.served import served, server_of
from bench.stored_episodes import fill, in_database
from service.rollout.report import percentile
from service.store.sql import SQLStore
from tests.support import postgres

_QUERIES: dict[str, dict[str, str]] = {
    "by policy": {},
    "by policy, with a baseline": {"baseline": "base"},
    "by policy, with a tag and a status": {"tag": "run", "status": "ended"},
    "by group, the first 8,000 episodes": {"by": "group", "until": "8000", "baseline": "g0"},
}
"""The last one has 1,000 groups of 8 episodes, the largest number of groups that a report may have."""
_POLL_S = 0.002
_SPACE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}
_console = Console(width=140, highlight=False)


def main(
    episodes: Annotated[int, typer.Option(min=1, help="Episodes in the store.")] = 100_000,
    length: Annotated[int, typer.Option(min=1, help="Steps of an episode.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each query is sent.")] = 5,
    kind: Annotated[str, typer.Option(help="sqlite or postgresql.")] = "sqlite",
) -> None:
    """Print, for each query, its duration, by how much the service's RSS grew, and the latency of acts meanwhile."""
    with _database(kind) as (folder, url):
        uvloop.run(_fill(url, episodes, length))
        with served(folder, scripted=True, store=url) as address, httpx.Client(base_url=address, timeout=120) as http:
            _console.print(_measured(http, server_of(address), rounds, f"{kind}, {episodes:,} episodes"))


@contextmanager
def _database(kind: str) -> Iterator[tuple[Path, str]]:
    """Yields a folder and the URL of an empty database."""
    (ROOT / "data").mkdir(exist_ok=True)  # /tmp may be in memory
    with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data") as name:
        if kind == "postgresql":
            with postgres.running() as server:
                yield Path(name), server.new()
        else:
            yield Path(name), f"sqlite:///{Path(name) / 'evaluation.db'}"


async def _fill(url: str, num_episodes: int, length: int) -> None:
    async with SQLStore(url):
        await fill(url, 0, num_episodes, length)
        if not url.startswith("sqlite"):
            await in_database(url, lambda connection: connection.execute(text("ANALYZE")))  # as autovacuum does


def _measured(http: httpx.Client, server: psutil.Process, rounds: int, title: str) -> Table:
    table = Table("query", "s", "RSS MB, first", "RSS MB, then", "act p50, p99 ms", title=title)
    _evaluate(http, {"until": "1000"})  # imports what the statistics need
    quiet = _acts(http, lambda: time.sleep(2))
    table.add_row("acts alone", "", "", "", f"{quiet[0]:.1f}, {quiet[1]:.1f}")
    for name, query in _QUERIES.items():
        table.add_row(name, *_row(http, server, query, rounds))
    return table


def _row(http: httpx.Client, server: psutil.Process, query: dict[str, str], rounds: int) -> tuple[str, ...]:
    seconds: list[float] = []
    grown = [_growth(server, lambda: seconds.append(_evaluate(http, query))) for _ in range(rounds)]
    p50, p99 = _acts(http, lambda: [_evaluate(http, query) for _ in range(rounds)])
    return f"{median(seconds):.2f}", f"{grown[0]:.1f}", f"{max(grown[1:], default=0):.1f}", f"{p50:.1f}, {p99:.1f}"


def _evaluate(http: httpx.Client, query: dict[str, str]) -> float:
    """Returns the seconds of the call."""
    began = time.perf_counter()
    http.get("/evaluation", params=query).raise_for_status()
    return time.perf_counter() - began


def _growth(server: psutil.Process, work: Callable[[], Any]) -> float:
    """Returns by how many MB the RSS of the service grew at most while the work was done."""
    before = server.memory_info().rss
    with _repeating(lambda: server.memory_info().rss, _POLL_S) as seen:
        work()
    return (max(seen, default=before) - before) / 1e6


def _acts(http: httpx.Client, work: Callable[[], Any]) -> tuple[float, float]:
    """Acts in one episode while the work is done. Returns the 50th and the 99th percentile of the latencies in ms."""
    opened = http.post("/episode", json={"action_space": _SPACE}).raise_for_status().json()
    with httpx.Client(base_url=http.base_url, timeout=120) as own:

        def act() -> float:
            began = time.perf_counter()
            body = {"episode_id": opened["episode_id"], "observation": "row 0, column 0"}
            own.post("/act", json=body).raise_for_status()
            return 1e3 * (time.perf_counter() - began)

        with _repeating(act, 0.0) as latencies:
            work()
    http.delete(f"/episode/{opened['episode_id']}").raise_for_status()
    return percentile(latencies, 50) or 0.0, percentile(latencies, 99) or 0.0


@contextmanager
def _repeating(call: Callable[[], float], pause_s: float) -> Iterator[list[float]]:
    """Repeats a call in a thread while the block runs. Yields the list of its results."""
    results: list[float] = []
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(pause_s):
            results.append(call())

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield results
    finally:
        is_over.set()
        thread.join()


if __name__ == "__main__":
    typer.run(main)
