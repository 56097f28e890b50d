"""`python -m bench.front_end`: acts per second of the API process's CPU time, with an engine that costs nothing.

Each act is one of four actions of one token, committed to SQLite with synchronous=FULL. The client is another process.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from bench.contenders import ROOT, Batches, Failed, ScriptedService
from bench.workloads import CHOICE1, Cell
from service.settings import Settings

_CELLS = {1: Cell(CHOICE1, 1, 20, num_sets=50), 32: Cell(CHOICE1, 32, 20, num_sets=5)}
_console = Console(width=100, highlight=False)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each cell. The table shows medians.")] = 7,
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used, as in EPISODIC_MODEL.")] = "toy-text",
) -> None:
    """Measure `POST /act` with 1 and 32 episodes, and `POST /act/batch` with 32."""
    given: dict[str, Any] = {"model": model}
    try:
        measured = uvloop.run(_run(rounds, Settings(**given).model_path))
    except Failed as error:
        _console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    table = Table("call", "episodes", "CPU us of an act", "acts per CPU second", "acts/s", title="The API alone")
    for (call, size), (cpu_ms, per_s) in measured.items():
        table.add_row(call, str(size), f"{1e3 * cpu_ms:.0f}", f"{1e3 / cpu_ms:.0f}", f"{per_s:.0f}")
    _console.print(table)


async def _run(rounds: int, model: str) -> dict[tuple[str, int], tuple[float, float]]:
    """Returns CPU milliseconds of an act and acts per second, by call and number of episodes."""
    (ROOT / "data").mkdir(exist_ok=True)
    samples: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data") as folder:
        service = ScriptedService(model, Path(folder))
        try:
            await service.start()
            calls = {("POST /act", 1): service, ("POST /act", 32): service, ("POST /act/batch", 32): Batches(service)}
            for number in range(rounds + 1):
                for (call, size), contender in calls.items():
                    sample = await contender.play(_CELLS[size], number)
                    if number:  # the first round warms up
                        samples.setdefault((call, size), []).append((sample.cpu_ms_per_step, sample.steps_per_s))
        finally:
            await service.stop()
    return {key: (median(cpu for cpu, _ in found), median(rate for _, rate in found)) for key, found in samples.items()}


if __name__ == "__main__":
    typer.run(main)
