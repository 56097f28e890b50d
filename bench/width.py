"""`python -m bench.width`: many concurrent episodes from one client, and the cost of an act in a large store.

The engine is scripted and costs next to nothing, unless --real is given.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from bench.contenders import ROOT, Batches, Failed, ScriptedService, Service
from bench.policy import endless
from bench.stored_episodes import fill
from bench.workloads import CHOICE1, Cell
from service.client import AsyncClient
from service.rollout import EnvironmentFactory, rollout
from service.settings import Settings
from service.store.sql import SQLStore

_ENV = "episodic/FrozenLakeRandom-v0"
_WIDTHS = (32, 256, 1000)
_LENGTH = 10
"""Steps of a stored episode."""
_console = Console(width=110, highlight=False)


@dataclass(frozen=True, slots=True)
class _Row:
    """Acts per second, latencies in milliseconds, and the number of answers with status 429."""

    client: str
    num_episodes: int
    per_s: float
    p50_ms: float
    p99_ms: float
    num_refused: int


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each episode.")] = 20,
    stored: Annotated[int, typer.Option(help="Episodes in the large store; 0 leaves this part out.")] = 100_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds with the large and with an empty store.")] = 5,
    model: Annotated[str, typer.Option(help="Model, as in EPISODIC_MODEL.")] = "toy-text",
    real: Annotated[bool, typer.Option("--real", help="Use the real engine.")] = False,
) -> None:
    """Play 32, 256 and 1,000 concurrent episodes, then 32 on an empty and on a large store."""
    given: dict[str, Any] = {"model": model}
    try:
        uvloop.run(_run(steps, stored, rounds, Settings(**given).model_path, real=real))
    except Failed as error:
        _console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


async def _run(steps: int, stored: int, rounds: int, model: str, *, real: bool) -> None:
    (ROOT / "data").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data") as name:
        folder = Path(name)
        policy = str(endless(Path(model), folder / "policy"))

        def service(data: str) -> Service:
            (folder / data).mkdir()
            return Service(policy, {}, folder / data) if real else ScriptedService(policy, folder / data)

        table = Table("client", "episodes", "acts/s", "p50 ms", "p99 ms", "429", title="Width")
        for row in await _widths(service("width"), steps):
            rates = (f"{value:.0f}" for value in (row.per_s, row.p50_ms, row.p99_ms))
            table.add_row(row.client, str(row.num_episodes), *rates, str(row.num_refused))
        _console.print(table)
        if stored:
            empty, large = service("empty"), service("large")
            await _store(f"sqlite:///{folder / 'large' / 'episodic.db'}", stored)
            costs = await _costs({"empty": empty, "large": large}, rounds)
            _console.print(f"CPU of an act with an empty store: {costs['empty']:.3f} ms; ", end="")
            _console.print(f"with {stored:,} episodes in the store: {costs['large']:.3f} ms ", end="")
            _console.print(f"({costs['large'] / costs['empty'] - 1:+.1%})")


async def _widths(service: Service, steps: int) -> list[_Row]:
    rows: list[_Row] = []
    try:
        await service.start()
        await service.play(Cell(CHOICE1, 32, steps), 0)  # warms up
        for width in _WIDTHS:
            for client, contender in (("POST /act", service), ("POST /act/batch", Batches(service))):
                played = await contender.play(Cell(CHOICE1, width, steps), width)  # a 429 would end it
                rows.append(_Row(client, width, played.steps_per_s, played.p50_ms, played.p99_ms, 0))
            rows.append(await _rollout(service.url, width, steps))
    finally:
        await service.stop()
    return rows


async def _rollout(url: str, width: int, steps: int) -> _Row:
    """Plays an environment with the Python client, which retries what is refused."""
    before = await _num_refused(url)
    async with AsyncClient(url) as client:
        factory = EnvironmentFactory(_ENV, max_episode_steps=steps)
        report = await rollout(factory, client, episodes=width, concurrency=width)
    if report.failures:
        raise Failed(f"{len(report.failures)} episodes failed: {report.failures[0].error}")
    latencies = (1e3 * (report.p50_s or 0.0), 1e3 * (report.p99_s or 0.0))
    return _Row("rollout", width, report.steps_per_s, *latencies, await _num_refused(url) - before)


async def _num_refused(url: str) -> int:
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{url}/metrics")).text
    pattern = r'^agent_acts_total\{outcome="(?:overloaded|rate_limited|quota_exceeded)"\} ([\d.e+]+)'
    return int(sum(float(number) for number in re.findall(pattern, text, re.MULTILINE)))


async def _store(url: str, num_episodes: int) -> None:
    async with SQLStore(url):
        pass  # creates the tables
    await fill(url, 0, num_episodes, _LENGTH)


async def _costs(services: dict[str, Service], rounds: int) -> dict[str, float]:
    """Returns the median of the CPU milliseconds of an act by service. The services play in turn."""
    found: dict[str, list[float]] = {name: [] for name in services}
    try:
        for service in services.values():
            await service.start()
        for number in range(rounds + 1):
            for name, service in services.items():
                sample = await service.play(Cell(CHOICE1, 32, 20, num_sets=4), number)
                if number:  # the first round warms up
                    found[name].append(sample.cpu_ms_per_step)
    finally:
        for service in services.values():
            await service.stop()
    return {name: median(values) for name, values in found.items()}


if __name__ == "__main__":
    typer.run(main)
