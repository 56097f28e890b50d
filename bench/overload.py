"""Measures overload: how many acts are served, how fast the others are refused, and the effect on another tenant.

Acts generate free text of a fixed number of tokens. At full capacity there are as many clients as slots, and each sends
its next act when the previous one is answered (closed loop). In the flood, acts arrive at ten times the rate that was
served at full capacity, whether earlier acts are answered or not (open loop).
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import orjson
import psutil
import typer
import uvloop
from rich.console import Console
from rich.table import Column, Table

from bench.http_client import Connection
from bench.policy import endless
from bench.served import served, server_of
from bench.workloads import INSTRUCTIONS, observations
from service.settings import Settings

_STEPS_AN_EPISODE = 20
_TICK_S = 0.01


@dataclass
class Record:
    """The results of one phase. `accepted_s` and `refused_s` are latencies in seconds.

    `num_unsent` is the number of acts that were not sent because no connection was free.
    """

    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    num_unsent: int = 0
    seconds: float = 0.0

    def add(self, status: int, seconds: float) -> None:
        self.statuses[status] += 1
        (self.accepted_s if status == 200 else self.refused_s).append(seconds)

    @property
    def goodput(self) -> float:
        return len(self.accepted_s) / self.seconds


class Lane:
    """One client with its own connection. It plays one episode after the other."""

    def __init__(self, url: str, name: str, max_tokens: int, key: str | None) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._connection = Connection(host, int(port))
        self._headers = f"Authorization: Bearer {key}\r\n" if key else ""
        self._name, self._max_tokens = name, max_tokens
        self._num_episodes, self._step = 0, _STEPS_AN_EPISODE
        self._observations: list[str] = []
        self.busy = False

    async def open(self) -> "Lane":
        await self._connection.open()
        return self

    def close(self) -> None:
        self._connection.close()

    async def act(self, record: Record) -> None:
        """Sends the next act, in a new episode if the last one is complete. A refused act is sent again next time."""
        self.busy = True
        try:
            if self._step == _STEPS_AN_EPISODE:
                await self._begin()
            body = {"episode_id": self._episode, "observation": self._observations[self._step], "step": self._step}
            began = time.perf_counter()
            answer = await self._connection.request("POST", "/act", orjson.dumps(body), self._headers)
            record.add(answer.status, time.perf_counter() - began)
            self._step += answer.status == 200
        finally:
            self.busy = False

    @property
    def _episode(self) -> str:
        return f"{self._name}-{self._num_episodes}"

    async def _begin(self) -> None:
        self._num_episodes += 1
        self._step = 0
        self._observations = observations(self._num_episodes, hash(self._name) % 997, _STEPS_AN_EPISODE)
        sampling = {"temperature": 0.0, "max_tokens": self._max_tokens}
        body = {"episode_id": self._episode, "instructions": INSTRUCTIONS, "sampling": sampling}
        await self._connection.post("/episode", body, self._headers)


async def _lanes(url: str, name: str, num: int, max_tokens: int, key: str | None = None) -> list[Lane]:
    return [await Lane(url, f"{name}{number}", max_tokens, key).open() for number in range(num)]


async def _closed(lanes: list[Lane], seconds: float) -> Record:
    """Closed loop: each lane sends its next act as soon as the previous one is answered."""
    record, began = Record(), time.perf_counter()

    async def play(lane: Lane) -> None:
        while time.perf_counter() < began + seconds:
            await lane.act(record)

    await asyncio.gather(*(play(lane) for lane in lanes))
    record.seconds = time.perf_counter() - began
    return record


async def _flood(lanes: list[Lane], rate: float, seconds: float) -> Record:
    """Open loop: `rate` acts per second, each on a free lane. `num_unsent` counts the acts without a free lane."""
    record, began, num_due = Record(), time.perf_counter(), 0
    acting: set[asyncio.Task[None]] = set()
    while (now := time.perf_counter()) < began + seconds:
        free = (lane for lane in lanes if not lane.busy)
        while num_due < (now - began) * rate:
            num_due += 1
            lane = next(free, None)
            if lane is None:
                record.num_unsent += 1
                continue
            task = asyncio.create_task(lane.act(record))
            acting.add(task)
            task.add_done_callback(acting.discard)
        await asyncio.sleep(_TICK_S)
    record.seconds = time.perf_counter() - began
    await asyncio.gather(*acting)
    return record


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1] if len(values) > 1 else float("nan")


def _row(name: str, record: Record) -> list[str]:
    served_ms = [1e3 * _percentile(record.accepted_s, percent) for percent in (50, 99)]
    refused_ms = [1e3 * _percentile(record.refused_s, percent) for percent in (50, 99)] if record.refused_s else []
    statuses = " ".join(f"{status}:{num}" for status, num in sorted(record.statuses.items()))
    times = [*(f"{value:.0f}" for value in served_ms), *(f"{value:.1f}" for value in refused_ms), *["", ""]][:4]
    return [name, f"{sum(record.statuses.values()) / record.seconds:.0f}", f"{record.goodput:.1f}", *times, statuses]


def _table(title: str) -> Table:
    numbers = ("sent/s", "served/s", "p50 ms", "p99 ms", "429 p50 ms", "429 p99 ms")
    return Table("", *(Column(name, justify="right") for name in numbers), "statuses", title=title, box=None)


async def _overload(url: str, num_running: int, max_tokens: int, seconds: float, table: Table) -> None:
    process = server_of(url)
    lanes = await _lanes(url, "c", num_running, max_tokens)
    await _closed(lanes, 5.0)
    full = await _closed(lanes, seconds / 2)
    table.add_row(*_row("full capacity", full))
    flooding = await _lanes(url, "f", 4 * num_running, max_tokens)
    await _flood(flooding, 10 * full.goodput, 5.0)
    before = process.memory_info().rss
    record = await _flood(flooding, 10 * full.goodput, seconds)
    grown = (process.memory_info().rss - before) / 1e6
    table.add_row(*_row("10 times that rate", record))
    ratio = _percentile(record.accepted_s, 99) / _percentile(full.accepted_s, 99)
    worst = max(status for status in record.statuses)
    table.caption = (
        f"Compared with full capacity: p99 of accepted acts {ratio:.2f} times (target: at most 2), goodput"
        f" {record.goodput / full.goodput:.0%} (target: at least 90%). RSS {grown:+.1f} MB, highest status {worst},"
        f" not sent because no connection was free: {record.num_unsent}"
    )
    for lane in [*lanes, *flooding]:
        lane.close()


async def _fairness(
    url: str, keys: dict[str, str], num_running: int, max_tokens: int, seconds: float, table: Table
) -> None:
    calm = await _lanes(url, "calm", num_running // 2, max_tokens, keys["calm"])
    await _closed(calm, 5.0)
    quiet = await _closed(calm, seconds / 2)
    table.add_row(*_row("the calm tenant alone", quiet))
    lanes = await _lanes(url, "flood", 4 * num_running, max_tokens, keys["flood"])
    capacity = await _closed(lanes[: num_running // 2], seconds / 4)
    flooding = asyncio.create_task(_flood(lanes, 10 * capacity.goodput, seconds / 2 + 5.0))
    await asyncio.sleep(5.0)
    beside = await _closed(calm, seconds / 2)
    record = await flooding
    table.add_row(*_row("the calm tenant during the flood", beside))
    table.add_row(*_row("the flooding tenant", record))
    ratio = _percentile(beside.accepted_s, 99) / _percentile(quiet.accepted_s, 99)
    table.caption = (
        f"p99 of the calm tenant during the flood: {ratio:.2f} times its value without the flood (target: at most 2)."
        f" Each tenant may have {num_running // 2} concurrent acts (EPISODIC_QUOTA__CONCURRENT_ACTS)"
    )
    for lane in [*calm, *lanes]:
        lane.close()


def _make_key(data: Path, tenant: str) -> str:
    command = [sys.executable, "-m", "service", "keys", "create", "--tenant", tenant]
    environment = {**os.environ, "EPISODIC_DATA": str(data)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def main(
    seconds: Annotated[float, typer.Option(help="Duration of the flood in seconds.")] = 60.0,
    running: Annotated[
        int, typer.Option(help="Number of slots (EPISODIC_MAX_RUNNING_ACTS). The queue has a quarter of that size.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(help="Number of tokens of an act.")] = 64,
    what: Annotated[str, typer.Option(help="What to measure: overload, fairness or both.")] = "both",
) -> None:
    """Print the latency, goodput and memory during a flood of acts, and the latency of another tenant."""
    console = Console(width=170, highlight=False)
    console.print(f"{psutil.cpu_count()} cores, {running} slots, {max_tokens} tokens per act")
    with tempfile.TemporaryDirectory() as folder:
        policy = endless(Path(Settings(model="toy-text").model_path), Path(folder) / "policy")
        settings = {"max_running_acts": str(running), "max_queued_acts": str(running // 4), "model": str(policy)}
        if what in ("overload", "both"):
            with served(**settings) as url:
                table = _table("Overload")
                uvloop.run(_overload(url, running, max_tokens, seconds, table))
                console.print(table)
        if what in ("fairness", "both"):
            data = Path(folder) / "data"
            keys = {tenant: _make_key(data, tenant) for tenant in ("calm", "flood")}
            with served(data, **settings, quota__concurrent_acts=str(running // 2)) as url:
                table = _table("Fairness")
                uvloop.run(_fairness(url, keys, running, max_tokens, seconds, table))
                console.print(table)


if __name__ == "__main__":
    typer.run(main)
