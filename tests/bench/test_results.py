"""Medians, ratios and noise of benchmark results, verdicts on targets, and the figures in the README."""

import io
import json
import re
from pathlib import Path

from rich.console import Console

from bench import report
from bench.measure import Sample, percentile
from bench.results import AGAIN, Bar, CellResult, bars
from bench.workloads import CHOICE1, CHOICE12, DECISION, REPLY, TEXT16, Cell


def _sample(steps_per_s: float, cpu_ms: float = 0.5) -> Sample:
    timing = {"queue_s": 0.1, "engine_s": 5.0, "store_s": 1.0, "total_s": 6.1}
    return Sample(1.0, steps_per_s, steps_per_s, 7.0, 9.0, cpu_ms, 300.0, 80.0, 2.0, 1.5, timing)


def _result(
    cell: Cell, service: list[float], openai: list[float], engine: list[float], cpu_ms: float, **others: list[float]
) -> CellResult:
    samples = {
        "service": [_sample(rate, cpu_ms) for rate in service],
        "openai": [_sample(rate) for rate in openai],
        "engine": [_sample(rate) for rate in engine],
        **{name: [_sample(rate) for rate in rates] for name, rates in others.items()},
        AGAIN: [_sample(service[0])],
    }
    return CellResult(cell, {name: of for name, of in samples.items() if of})


def _results() -> list[CellResult]:
    return [
        _result(Cell(CHOICE1, 32, 20), [90, 300, 100], [40, 50, 500], [120, 100, 110], 0.9, batch=[104.5]),
        _result(Cell(CHOICE12, 1, 20), [59, 59, 59], [10, 10, 10], [80, 80, 80], 3.5),
        _result(Cell(TEXT16, 8, 20), [10, 10, 10], [10, 10, 10], [10, 10, 10], 2.0, logprobs=[8, 8, 8]),
        _result(Cell(DECISION, 1, 20), [12], [], [], 2.0, systemone=[10]),
        _result(Cell(REPLY, 8, 12), [29], [10], [], 2.0),
        _result(Cell(CHOICE1, 32, 200, service_only=True), [80, 80, 80], [], [], 1.2),
    ]


def test_one_slow_or_fast_round_moves_no_median() -> None:
    first = _results()[0]
    assert first.median("service", "steps_per_s") == 100
    assert first.ratio("service", "openai") == 2.0
    assert first.noise is not None
    assert round(first.noise, 6) == 0.1
    assert first.spread("service") == 2.1
    assert first.median("nobody", "steps_per_s") is None


def test_bars_pass_miss_and_are_left_out_where_nothing_was_measured() -> None:
    verdicts = {bar.what: (bar.value and round(bar.value, 3), bar.passed) for bar in bars(_results())}
    assert verdicts == {
        "service/engine steps/s, actions of 1 token, 32x20": (0.909, True),
        "service/engine steps/s, actions of 12 tokens, 1x20": (0.738, False),
        "service/engine steps/s, free text of 16 tokens, 8x20": (1.0, True),
        "batch/engine steps/s, actions of 1 token, 32x20": (0.95, True),
        "service/openai steps/s, actions of 1 token, 32x20": (2.0, True),
        "service/openai steps/s, actions of 12 tokens, 1x20": (5.9, False),
        "service/logprobs steps/s, free text of 16 tokens, 8x20": (1.25, True),
        "service/openai steps/s, free text of 16 tokens, 8x20": (1.0, True),
        "service/systemone steps/s, actions of 1 token, random Qwen3, 1x20": (1.2, False),
        "service/openai steps/s, replies of 12 tokens, SmolLM2, 8x12": (2.9, False),
        "service/engine API-process CPU a step, actions of 1 token, 32x20": (1.8, True),
        "API-process CPU a step at 200 steps over 20, 32 episodes": (1.333, False),
    }
    assert Bar("x", None, 1.0, at_least=True).passed is None


def test_percentiles_are_nearest_rank() -> None:
    ordered = [float(value) for value in range(100)]
    assert (percentile(ordered, 0.5), percentile(ordered, 0.99), percentile([3.0], 0.99)) == (50.0, 99.0, 3.0)


def test_the_tables_show_every_contender_and_each_bar_with_its_verdict() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(_results(), bars(_results()), console)
    printed = console.export_text()
    for label in report.LABELS.values():
        assert label in printed
    assert (printed.count("PASS"), printed.count("MISS")) == (7, 5)


def test_the_file_holds_every_round_and_the_plot_is_drawn(tmp_path: Path) -> None:
    results, facts = _results(), report.machine()
    report.write_json(tmp_path / "results.json", facts, {"rounds": 3}, results, bars(results))
    written = json.loads((tmp_path / "results.json").read_text())
    assert [cell["medians"]["service"]["steps_per_s"] for cell in written["cells"]] == [100, 59, 10, 12, 29, 80]
    assert [sample["steps_per_s"] for sample in written["cells"][0]["rounds"]["openai"]] == [40, 50, 500]
    assert [bar["passed"] for bar in written["bars"]] == [bar.passed for bar in bars(results)]
    assert not {"hostname", "user", "path"} & set(written["machine"])
    report.plot(tmp_path / "results.png", results, facts)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_figures_in_the_readme_are_those_of_the_last_run() -> None:
    folder = Path(report.__file__).parent
    last = json.loads((folder / "results.json").read_text())["cells"]
    cells = {(cell["workload"], cell["episodes"], cell["steps"]): cell["medians"] for cell in last}
    rows = re.findall(
        r"^\| (\w+), (\d+) episodes? of (\d+) steps \| (.*) \|$", (folder / "README.md").read_text(), re.M
    )
    assert len(rows) == 9
    for workload, episodes, steps, figures in rows:
        medians = cells[workload, int(episodes), int(steps)]
        service, openai, engine = (medians[name]["steps_per_s"] for name in ("service", "openai", "engine"))
        assert figures == f"{service:.0f} | {openai:.0f} | {engine:.0f} | {service / openai:.2f}"
