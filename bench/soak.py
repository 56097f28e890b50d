"""Soak test: runs a mixed load on one service for a long time and reports what grows: memory, tasks, files."""

import asyncio
import json
import sqlite3
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated

import httpx
import typer

from bench import report, soak_report
from bench.served import served, server_of
from bench.soak_load import Load
from bench.soak_report import Sample
from service.client import AsyncClient, Retry

_EVERY_S = 5.0
_SETTLE_S = 15.0
"""Pause in seconds after the load. Idle episodes have then expired, and the engine's metrics are up to date."""
_SETTINGS = {"engine__kv_cache_memory_bytes": str(1 << 27)}
"""A KV cache so small that it fills up in the warm-up. Its memory counts as resident only after the first write."""


class Probe:
    """Samples a service from outside: its processes, its metrics and its SQLite file."""

    def __init__(self, url: str, data: Path) -> None:
        self._url = url
        self._file = data / "episodic.db"
        self._server = server_of(url)
        children = self._server.children(recursive=True)
        self._engine = next(child for child in children if "EngineCore" in " ".join(child.cmdline()))

    async def sample(self, at_s: float) -> Sample:
        metrics = await self._metrics()
        episodes, tombstones, steps, free_bytes = await asyncio.to_thread(self._rows)
        return Sample(
            at_s=round(at_s, 1),
            server_mb=self._server.memory_info().rss / 1e6,
            engine_mb=self._engine.memory_info().rss / 1e6,
            num_fds=self._server.num_fds(),
            num_threads=self._server.num_threads(),
            num_tasks=metrics["agent_tasks"],
            live_episodes=metrics["agent_live_episodes"],
            acts=metrics.get("agent_acts_total", 0.0),
            store_mb=self._size_mb(""),
            free_mb=free_bytes / 1e6,
            wal_mb=self._size_mb("-wal"),
            episodes=episodes,
            tombstones=tombstones,
            steps=steps,
        )

    async def _metrics(self) -> Mapping[str, float]:
        """The service's own metrics (agent_*), each summed over its labels."""
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as http:
            lines = (await http.get("/metrics")).text.splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("agent_"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def _rows(self) -> tuple[int, int, int, int]:
        """The numbers of episodes, of tombstones and of steps, and the size of the file's free pages in bytes."""
        query = """SELECT count(*) FILTER (WHERE deleted_at IS NULL), count(deleted_at), (SELECT count(*) FROM steps),
            (SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size) FROM episodes"""
        with closing(sqlite3.connect(f"file:{self._file}?mode=ro", uri=True, timeout=30)) as connection:
            return connection.execute(query).fetchone()

    def _size_mb(self, suffix: str) -> float:
        file = self._file.with_name(self._file.name + suffix)
        return file.stat().st_size / 1e6 if file.exists() else 0.0


async def _soak(url: str, data: Path, seconds: float, seed: int) -> tuple[list[Sample], Load]:
    probe, began = Probe(url, data), time.monotonic()
    samples: list[Sample] = []
    async with AsyncClient(url, retry=Retry(total_s=120.0)) as client:
        load = Load(client, seed, began + seconds)
        playing = asyncio.create_task(load.run())
        while not playing.done():
            samples.append(await probe.sample(time.monotonic() - began))
            await asyncio.wait([playing], timeout=_EVERY_S)
        await playing
    await asyncio.sleep(_SETTLE_S)
    samples.append(await probe.sample(time.monotonic() - began))
    return samples, load


def main(
    minutes: Annotated[float, typer.Option(help="Duration of the load in minutes.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Seed of the load's random choices.")] = 7,
    warm_up_s: Annotated[
        float | None,
        typer.Option(help="Seconds at the start that are not evaluated. Default: a third of the time, at most 600."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Path of the results without suffix: writes OUT.json and OUT.png.")] = Path(
        "bench/soak"
    ),
) -> None:
    """Run a soak test of the service.

    The exit code is 1 if a figure grows (in runs that are long enough to tell) or if a call failed unexpectedly."""
    warm_up_s = min(minutes * 20, 600.0) if warm_up_s is None else warm_up_s
    facts = report.machine()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), **_SETTINGS) as url:
        samples, load = asyncio.run(_soak(url, Path(folder), minutes * 60, seed))
    loaded, idle = [sample for sample in samples if sample.at_s <= minutes * 60], samples[-1]
    found = soak_report.trends(loaded, warm_up_s)
    document = {"machine": facts, "minutes": minutes, "seed": seed, "warm_up_s": warm_up_s, "counts": load.counts}
    document |= {"failures": load.failures, **soak_report.document(samples, found)}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    soak_report.plot(out.with_suffix(".png"), loaded, found, warm_up_s)
    measured_s = minutes * 60 - warm_up_s
    _print(load, found, loaded, idle)
    typer.echo(soak_report.verdict(found, measured_s, sum(load.failures.values())))
    grows = measured_s >= soak_report.ENOUGH_S and any(trend.grows for trend in found)
    raise typer.Exit(int(grows or bool(load.failures)))


def _print(load: Load, found: list[soak_report.Trend], loaded: list[Sample], idle: Sample) -> None:
    last, (of_step, of_tombstone) = loaded[-1], soak_report.bytes_each(loaded)
    typer.echo("load: " + ", ".join(f"{number} {name}" for name, number in sorted(load.counts.items())))
    for trend in found:
        typer.echo(str(trend))
    typer.echo(
        f"store: {last.steps} steps of {last.episodes} episodes, {last.tombstones} tombstones of deleted episodes; "
        f"a step takes {of_step:.0f} bytes in the file, a tombstone {of_tombstone:.0f} bytes"
    )
    typer.echo(
        f"idle after the load: {idle.num_fds} file descriptors, {idle.num_tasks:.0f} tasks, {idle.server_mb:.0f} MB, "
        f"{idle.live_episodes:.0f} cached episodes"
    )
    for failure, times in load.failures.most_common(10):
        typer.echo(f"failed {times} times: {failure}")


if __name__ == "__main__":
    typer.run(main)
