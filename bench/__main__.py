"""`python -m bench`: runs all cells of the grid on each contender and writes results.json and results.png."""

import asyncio
import json
import signal
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console

from bench import report
from bench.contenders import NAMES, ROOT, Contender, Failed, contenders
from bench.models import Missing, weights
from bench.results import AGAIN, CellResult, bars
from bench.workloads import Cell, Model, grid, played_on
from service.settings import Settings

SETTLE_S = 0.4
"""Pause in seconds before a sample. OpenMP's threads use the CPU for 0.2 s after their last work."""

_console = Console(width=150, highlight=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `budget_s`: after this many seconds in one cell, a contender's further rounds are skipped."""

    cells: list[Cell]
    contenders: list[str]
    rounds: int
    budget_s: float


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each cell. The report has the medians.")] = 3,
    quick: Annotated[bool, typer.Option(help="Run a small grid in one round, to check that everything works.")] = False,
    cells: Annotated[
        list[str] | None, typer.Option(help='Run only cells whose name contains this text, for example "choice1 32x".')
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--contenders", help=f"Run only these contenders: {', '.join(NAMES)}.")
    ] = None,
    budget_s: Annotated[
        float, typer.Option(help="Skip a contender's further rounds of a cell after this many seconds.")
    ] = 30,
    model: Annotated[str, typer.Option(help="Model, as in EPISODIC_MODEL.")] = "toy-text",
    engine: Annotated[
        list[str] | None, typer.Option(help="Engine option for all contenders, NAME=VALUE. Can be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = ROOT / "bench",
) -> None:
    """Compare the service (a, d), vLLM's own server (b, e) and the bare AsyncLLM (c) under the same load."""
    named = only or list(NAMES)
    if unknown := set(named) - set(NAMES):
        hint = f"unknown contender {min(unknown)!r}; the contenders are {', '.join(NAMES)}"
        raise typer.BadParameter(hint, param_hint="--contenders")
    wanted = [cell for cell in grid(quick=quick) if not cells or any(part in cell.name for part in cells)]
    if not wanted:
        raise typer.BadParameter("no cell's name contains this text", param_hint="--cells")
    options = dict(_option(pair) for pair in engine or [])
    plan = Plan(wanted, named, 1 if quick else rounds, budget_s)
    facts = report.machine()
    began = time.perf_counter()
    try:
        results = uvloop.run(_run(plan, _path(model), options))
    except Failed as error:
        _console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    found = bars(results)
    report.show(results, found, _console)
    run = {"model": model, "engine": options, "rounds": plan.rounds, "budget_s": budget_s}
    output.mkdir(parents=True, exist_ok=True)
    report.write_json(output / "results.json", facts, run, results, found)
    report.plot(output / "results.png", results, facts)
    _console.print(f"{(time.perf_counter() - began) / 60:.1f} minutes. Wrote results.json and results.png.")


def _path(model: str) -> str:
    """The path of the weights that the service would load for this model name."""
    given: dict[str, Any] = {"model": model}
    return Settings(**given).model_path


def _option(pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise typer.BadParameter(f"expected NAME=VALUE, got {pair!r}", param_hint="--engine")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


async def _run(plan: Plan, model: str, options: dict[str, Any]) -> list[CellResult]:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]
    (ROOT / "data").mkdir(exist_ok=True)  # the service's default data folder; /tmp may be in memory
    found: list[CellResult] = []
    for name in dict.fromkeys(cell.workload.model for cell in plan.cells):
        with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data") as folder:
            try:
                path = await asyncio.to_thread(weights, name, Path(model), Path(folder))
            except Missing as error:
                _console.print(f"Skipped the cells on {name}: {error}", markup=False, soft_wrap=True)
                continue
            found += await _run_on(name, str(path), plan, options, Path(folder))
    return found


async def _run_on(model: Model, path: str, plan: Plan, options: dict[str, Any], folder: Path) -> list[CellResult]:
    """Runs the cells that are played on one model."""
    cells = [cell for cell in plan.cells if cell.workload.model == model]
    needed = {name for cell in cells for name in cell.contenders} & set(plan.contenders)
    every = contenders(path, options, folder)
    running = {name: every[name] for name in NAMES if name in needed}
    async with AsyncExitStack() as stack:
        for name, contender in running.items():
            stack.push_async_callback(contender.stop)
            began = time.perf_counter()
            await contender.start()
            await _warm_up(name, contender, model)
            _console.print(f"{report.LABELS[name]}: started and warmed up in {time.perf_counter() - began:.0f} s")
        return [await _play(cell, plan, running) for cell in cells]


async def _warm_up(name: str, contender: Contender, model: Model) -> None:
    for workload in played_on(model):
        if name in workload.contenders:
            await contender.play(Cell(workload, num_episodes=16, num_steps=3), run=0)


async def _play(cell: Cell, plan: Plan, running: dict[str, Contender]) -> CellResult:
    """Runs all rounds of a cell. The contenders alternate, each round starts with another one.

    At the end, one more round of the service shows the noise.
    """
    result = CellResult(cell)
    names = [name for name in running if name in cell.contenders]
    spent = dict.fromkeys(names, 0.0)
    for turn in range(plan.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if spent[name] < plan.budget_s:
                sample = await _sample(running[name], cell, turn + 1)
                result.samples.setdefault(name, []).append(sample)
                spent[name] += sample.seconds
    if "service" in names:
        result.samples[AGAIN] = [await _sample(running["service"], cell, plan.rounds + 1)]
    _console.print(_progress(result))
    return result


async def _sample(contender: Contender, cell: Cell, run: int) -> Any:
    await asyncio.sleep(SETTLE_S)
    return await contender.play(cell, run)


def _progress(result: CellResult) -> str:
    rates = (f"{name} {result.median(name, 'steps_per_s'):.0f}" for name in result.samples)
    return f"{result.cell.name}: " + ", ".join(rates) + " steps/s"


if __name__ == "__main__":
    typer.run(main)
