"""`python -m bench.profile`: the API process's CPU time of an act by part, for the service and the bare engine."""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from bench.contenders import ROOT, BareEngine, Failed, Service
from bench.policy import endless
from bench.workloads import CHOICE1, Cell, played_on
from service.settings import Settings

_CELLS = {1: Cell(CHOICE1, 1, 20, num_sets=20), 32: Cell(CHOICE1, 32, 20, num_sets=2)}
_console = Console(width=120, highlight=False)


@dataclass(slots=True)
class _Profile:
    """What the rounds of one contender in one cell measured."""

    cpu_ms: list[float] = field(default_factory=list[float])
    counts: Counter[str] = field(default_factory=Counter[str])
    main_s: float = 0.0
    others_s: float = 0.0

    def parts_ms(self) -> dict[str, float]:
        """CPU milliseconds of an act by part. The parts of the main thread, and the other threads, add up to all."""
        total = median(self.cpu_ms)
        main = total * self.main_s / (self.main_s + self.others_s)
        parts = {part: main * count / self.counts.total() for part, count in self.counts.items()}
        return {**parts, "other threads": total - main, "all": total}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each cell.")] = 7,
    model: Annotated[str, typer.Option(help="Model, as in EPISODIC_MODEL.")] = "toy-text",
) -> None:
    """Profile acts of one token, with 1 and 32 concurrent episodes of 20 steps."""
    given: dict[str, Any] = {"model": model}
    try:
        profiles = uvloop.run(_run(rounds, Settings(**given).model_path))
    except Failed as error:
        _console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    _console.print(_table(profiles))


async def _run(rounds: int, model: str) -> dict[str, _Profile]:
    (ROOT / "data").mkdir(exist_ok=True)
    profiles: dict[str, _Profile] = {}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data")))
        policy = str(endless(Path(model), folder / "policy"))
        running: dict[str, tuple[Service | BareEngine, Path]] = {}
        for name, kind in {"service": Service, "engine": BareEngine}.items():
            output = folder / f"{name}.json"
            contender = kind(policy, {}, folder, [sys.executable, "-m", "bench.sampler", str(output)])
            stack.push_async_callback(contender.stop)
            await contender.start()
            for workload in played_on("policy"):
                await contender.play(Cell(workload, num_episodes=16, num_steps=3), run=0)
            running[name] = contender, output
        for number in range(1, rounds + 1):
            for size, cell in _CELLS.items():
                for name, (contender, output) in running.items():
                    profile = profiles.setdefault(f"{name} {cell.size}", _Profile())
                    await _add(profile, contender, output, cell, number * 100 + size)
    return profiles


async def _add(profile: _Profile, contender: Service | BareEngine, output: Path, cell: Cell, run: int) -> None:
    """Plays a round twice: once to measure the CPU time, and once to sample it, which itself takes time."""
    profile.cpu_ms.append((await contender.play(cell, run)).cpu_ms_per_step)
    os.kill(contender.pid, signal.SIGUSR1)
    await contender.play(cell, run + 50)
    os.kill(contender.pid, signal.SIGUSR2)
    found = await asyncio.to_thread(_taken, output)
    profile.counts.update(found["counts"])
    profile.main_s += found["main_s"]
    profile.others_s += found["others_s"]


def _taken(output: Path) -> dict[str, Any]:
    """Waits for the file that the sampler writes, and removes it."""
    while not output.exists():
        time.sleep(0.01)
    found = json.loads(output.read_text())
    output.unlink()
    return found


def _table(profiles: dict[str, _Profile]) -> Table:
    columns = {name: profile.parts_ms() for name, profile in profiles.items()}
    rows = {part for parts in columns.values() for part in parts}
    table = Table("CPU ms of an act", *columns, title="API process by part")
    first = next(iter(columns.values()))
    for part in sorted(rows, key=lambda part: (part in ("other threads", "all"), part == "all", -first.get(part, 0.0))):
        table.add_row(part, *(f"{parts.get(part, 0.0):.3f}" for parts in columns.values()))
    return table


if __name__ == "__main__":
    typer.run(main)
