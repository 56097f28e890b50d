"""The command `episodic evaluate`, and the tables of an evaluation.

The API key comes from EPISODIC_API_KEY.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Unpack

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service.cli.episodes import UNLIMITED, Url, service_at, with_options
from service.client import DEFAULT_URL, Comparison, Evaluation, EvaluationGroup, EvaluationQuery
from service.client.calls import evaluation_as_markdown
from service.filters import EVALUATION, FILTERS

_NARROW = 110
"""Below this width of the terminal, the table leaves out columns."""
_STYLES = {"better": "green", "worse": "red", "tied": "yellow", "too_few": "yellow"}


@with_options({**EVALUATION, **FILTERS})
def evaluate_command(
    url: Url = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer of the HTTP API.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    **query: Unpack[EvaluationQuery],
) -> None:
    """Summarize episodes by policy or another label, and compare the groups with a baseline."""
    if as_json and as_markdown:
        raise typer.BadParameter("use either --json or --markdown", param_hint="--json")
    with service_at(url) as client:
        if as_markdown:
            typer.echo(client.run(evaluation_as_markdown(query)), nl=False)
            return
        found = client.evaluation(**query)
    if as_json:
        typer.echo(found.model_dump_json(by_alias=True))
    else:
        print_evaluation(found)


def print_evaluation(found: Evaluation) -> None:
    """Prints the tables of groups and comparisons, and the warnings."""
    console = Console(width=None if sys.stdout.isatty() else UNLIMITED, highlight=False)
    if found.groups:
        console.print(_groups(found, is_narrow=console.width < _NARROW))
        console.print(f"[dim]{found.level:.4g} confidence intervals.[/dim]")
    if found.comparisons:
        console.print(_comparisons(found))
    for warning in found.warnings:
        console.print(f"{warning.code}: {warning.detail}", style="yellow", markup=False, soft_wrap=True)


def _groups(found: Evaluation, *, is_narrow: bool) -> Table:
    names = list(_CELLS)[: _NUM_NARROW if is_narrow else None]
    table = _table(found.by, *names)
    for group in found.groups:
        table.add_row(_label(group.value), *(escape(_CELLS[name](group)) for name in names))
    return table


def _comparisons(found: Evaluation) -> Table:
    table = _table(found.by, "baseline", "metric", "difference", "pairs", "p adjusted", "method", "verdict")
    for one in found.comparisons:
        p = "-" if one.p_adjusted is None else f"{one.p_adjusted:.2g}"
        cells = (one.metric, _interval(one.delta, one.low, one.high), f"{one.pairs:,}", p, one.method)
        table.add_row(_label(one.a), _label(one.b), *map(escape, cells), _verdict(one))
    return table


def _table(first: str, *names: str) -> Table:
    table = Table(Column(first, overflow="fold"), box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold", justify="left" if name in _TEXTS else "right")
    return table


_TEXTS = ("baseline", "metric", "method", "verdict", "excluded")


def _label(value: str | None) -> str:
    """Returns the cell of a label. Characters that could control the terminal are shown as U+FFFD."""
    if value is None:
        return "[dim]none[/dim]"
    return escape("".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in value))


def _verdict(comparison: Comparison) -> str:
    style = _STYLES.get(comparison.verdict)
    shown = escape(comparison.verdict.replace("_", " "))
    return f"[{style}]{shown}[/{style}]" if style else shown


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return _number(value) if low is None or high is None else f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3f}{unit}" if abs(value) < 1e6 else f"{value:.3g}{unit}"


def _by_k(values: dict[int, float] | None) -> str:
    return ", ".join(f"{k}: {rate:.3f}" for k, rate in (values or {}).items()) or "-"


def _excluded(group: EvaluationGroup) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in group.excluded.items()) or "-"


_CELLS: dict[str, Callable[[EvaluationGroup], str]] = {
    "episodes": lambda one: f"{one.episodes:,}",
    "completion": lambda one: _interval(one.completion.rate, one.completion.low, one.completion.high),
    "return": lambda one: _interval(one.returns.mean, one.returns.low, one.returns.high),
    "length": lambda one: _number(one.length.mean),
    "IQM": lambda one: _interval(one.returns.iqm, one.returns.iqm_low, one.returns.iqm_high),
    "rating": lambda one: _interval(one.human.mean, one.human.low, one.human.high),
    "pass@k": lambda one: _by_k(one.pass_at),
    "pass^k": lambda one: _by_k(one.pass_all),
    "act p50": lambda one: _number(one.act_seconds.p50, " s"),
    "excluded": _excluded,
}
"""The columns of the table of groups."""
_NUM_NARROW = 4
"""The number of these columns that a narrow terminal shows."""
