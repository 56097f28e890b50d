"""The table of `episodic rollout`: what each policy and the random policy achieved, and what went wrong."""

from collections import Counter
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.evaluation.statistics import Interval
from service.rollout.report import Report, Summary


def print_table(reports: Mapping[str, Report]) -> None:
    """Prints the reports of one or more policies side by side, with the random policy in the last column."""
    first = next(iter(reports.values()))
    table = Table(title=f"{first.env}, seeds {first.seed} to {first.seed + first.num_seeds - 1}")
    for name in ("", *reports, "random"):
        table.add_column(escape(name), justify="left" if not name else "right")
    columns = [_cells(report.policy) for report in reports.values()]
    for cells in zip(_LABELS, *columns, _cells(first.random), strict=True):
        table.add_row(*cells)
    table.add_section()
    for label, cell in _SPEEDS.items():
        table.add_row(label, *map(cell, reports.values()), "")
    console = Console()
    console.print(table)
    console.print(
        "[dim]95% confidence intervals: Wilson for the rate, Student's t for the mean.[/dim]", highlight=False
    )
    for name, report in reports.items():
        _print_notes(console, "" if len(reports) == 1 else f"{name}: ", report)


def _print_notes(console: Console, prefix: str, report: Report) -> None:
    """Prints what went wrong, with the name of the policy as a prefix if there are several."""
    if num_unknown := report.policy.success_unknown:
        console.print(prefix + _UNKNOWN.format(num_unknown, report.policy.episodes), style="yellow", markup=False)
    for reason, count in report.ended_early.items():
        console.print(f"{prefix}{count} ended early: {_REASONS[reason]}", style="yellow", markup=False)
    for error, count in Counter(failure.error for failure in report.failures).most_common(_MAX_ERRORS):
        console.print(f"{prefix}{count} failed: {error}", style="red", markup=False)


_UNKNOWN = (
    "The success of {} of {} episodes is unknown, and the completion rate leaves them out: neither the environment's "
    "description nor its info defines success. Define it with --success-at RETURN or --describe MODULE:CLASS."
)
_REASONS = {
    "parse_failure": "the policy's text was not a valid action",
    "ended_by_service": "the service ended the episode (a step limit, a full context or an idle timeout)",
}
_MAX_ERRORS = 10
_LABELS = ("episodes", "completion rate", "terminated", "mean return", "mean length")


def _cells(summary: Summary) -> tuple[str, ...]:
    return (
        str(summary.episodes),
        _with_interval(summary.completion_rate, summary.completion_rate_ci95),
        str(summary.terminated),
        _with_interval(summary.mean_return, summary.mean_return_ci95),
        _number(summary.mean_length),
    )


def _with_interval(value: float | None, interval: Interval | None) -> str:
    return _number(value) if interval is None else f"{_number(value)} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


_SPEEDS: dict[str, Callable[[Report], str]] = {
    "steps/s": lambda report: f"{report.steps_per_s:.1f}",
    "/act p50": lambda report: _milliseconds(report.p50_s),
    "/act p99": lambda report: _milliseconds(report.p99_s),
}
