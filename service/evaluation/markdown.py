"""Writes a report as Markdown, for example to paste it into a pull request. Labels are hostile text and are escaped."""

import re
from collections.abc import Iterable, Sequence
from math import isfinite

from service.evaluation.report import Compared, Group, Report

_MAX_LABEL = 80
_REFERENCE = re.compile(r"(?<!\w)([@#])(?=\w)")
"""What GitHub turns into a mention of a user, or into a link to an issue."""
_ACTIVE = re.compile(r"[\\`*_{}\[\]<>|#!~&$:]")
"""Characters that have a meaning in Markdown or in a table, or that make a link of a URL."""
_WORD_JOINER = "\u2060"


def as_markdown(report: Report) -> str:
    """Returns the report as a table of groups, a table of comparisons, and a list of warnings."""
    parts = [
        f"### Evaluation by {escaped(report.by)}",
        _groups(report.groups) if report.groups else "",
        _comparisons(report.comparisons) if report.comparisons else "",
        f"Intervals: {report.level:.10g} confidence." if report.groups else "",
        "\n".join(f"- `{warning.code}`: {escaped(warning.detail)}" for warning in report.warnings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Returns Markdown that shows exactly this text, on one line. Characters that are not printable become U+FFFD."""
    printable = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
    return _ACTIVE.sub(r"\\\g<0>", _REFERENCE.sub(rf"\1{_WORD_JOINER}", printable))


def _label(value: str | None) -> str:
    if not value:
        return "*none*" if value is None else "*empty*"
    return escaped(value if len(value) <= _MAX_LABEL else value[: _MAX_LABEL - 1] + "…")


def _groups(groups: Sequence[Group]) -> str:
    columns: dict[str, list[str]] = {
        "group": [_label(group.value) for group in groups],
        "episodes": [f"{group.episodes:,}" for group in groups],
        "excluded": [_counts(group) for group in groups],
        "completion": [_interval(one.completion.rate, one.completion.low, one.completion.high) for one in groups],
        "return": [_interval(one.returns.mean, one.returns.low, one.returns.high) for one in groups],
        "IQM of returns": [_interval(one.returns.iqm, one.returns.iqm_low, one.returns.iqm_high) for one in groups],
        "mean length": [number(group.length.mean) for group in groups],
    }
    if any(group.human.n for group in groups):
        columns["rating"] = [_interval(one.human.mean, one.human.low, one.human.high) for one in groups]
    for name in ("pass_at", "pass_all"):
        if any(getattr(group, name) for group in groups):
            columns[{"pass_at": "pass@k", "pass_all": "pass^k"}[name]] = [_by_k(getattr(one, name)) for one in groups]
    return _table(columns)


def _comparisons(comparisons: Sequence[Compared]) -> str:
    return _table(
        {
            "group": [_label(one.a) for one in comparisons],
            "baseline": [_label(one.b) for one in comparisons],
            "metric": [one.metric for one in comparisons],
            "difference": [_interval(one.delta, one.low, one.high) for one in comparisons],
            "pairs": [f"{one.pairs:,}" for one in comparisons],
            "p (adjusted)": ["-" if one.p_adjusted is None else f"{one.p_adjusted:.3g}" for one in comparisons],
            "method": [one.method.replace("_", " ") for one in comparisons],
            "verdict": [f"**{one.verdict.replace('_', ' ')}**" for one in comparisons],
        }
    )


def _table(columns: dict[str, list[str]]) -> str:
    rows: Iterable[Iterable[str]] = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _counts(group: Group) -> str:
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in group.excluded.items()) or "-"


def _by_k(values: "dict[int, float] | None") -> str:
    return ", ".join(f"{rate:.3f} (k = {k})" for k, rate in (values or {}).items()) or "-"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def number(value: float | None) -> str:
    """Returns a number with three decimals, or with three digits if it is large; a dash if it is unknown."""
    if value is None or not isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"
