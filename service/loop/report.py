"""The report of a learning run, as JSON and as a plot."""

import json
from pathlib import Path
from typing import Any

from service.files import complete_file
from service.loop.state import Result, State, write

REPORT, PLOT = "report.json", "learning_curve.png"


def complete(state: State) -> Result:
    """Writes the report and the plot, and returns the report."""
    best = state.best
    document: Result = {
        "name": state.plan["name"],
        "env": state.plan["env"],
        "base": state.base,
        "best": {"policy": best.policy, "round": best.round, "adapter": best.adapter and str(best.adapter)},
        "final": state.final,
        "rounds": state.as_json()["rounds"],
        "seeds": state.seeds,
        "seconds": state.seconds,
        "plot": plot(state, state.out / PLOT),
    }
    write(state.out / REPORT, document)
    return json.loads(json.dumps(document))


def plot(state: State, path: Path) -> str | None:
    """Draws the learning curve. Returns the path, or None if matplotlib is not installed or nothing was compared."""
    if not any("select" in played.phases for played in state.rounds):
        return None
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    drawn: Any = pyplot.subplots(figsize=(7, 4), layout="constrained")
    figure, axes = drawn
    _draw(axes, state)
    with complete_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return str(path)


def _draw(axes: Any, state: State) -> None:
    selected = [played for played in state.rounds if "select" in played.phases]
    metric = selected[0].phases["select"]["metric"]
    name = "completion_rate" if metric == "completion" else "mean_return"
    sampled = {played.number: played.phases["rollout"][name] for played in state.rounds if "rollout" in played.phases}
    axes.plot(list(sampled), list(sampled.values()), "s--", color="0.6", label="training, sampled")
    for side, shift, label in (("candidate", 0.04, "candidate, greedy"), ("baseline", -0.04, "best before, greedy")):
        found = [played.phases["select"][side] for played in selected]
        _with_intervals(axes, [played.number + shift for played in selected], found, label)
    for played in selected:
        if played.is_promoted:
            value = played.phases["select"]["candidate"]["value"]
            axes.annotate("better", (played.number, value), (8, 6), textcoords="offset points")
    ticks = [str(played.number) for played in state.rounds]
    if state.final is not None:
        ticks.append("final")
        _with_intervals(axes, [len(ticks) + 0.04], [state.final["candidate"]], "final test, best")
        _with_intervals(axes, [len(ticks) - 0.04], [state.final["baseline"]], "final test, base model")
    axes.set_xticks(range(1, len(ticks) + 1), ticks)
    axes.set(xlabel="round", ylabel=metric, title=f"{state.plan['name']} on {state.plan['env']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _with_intervals(axes: Any, at: list[float], found: list[Result], label: str) -> None:
    values = [one["value"] for one in found]
    low = [0.0 if one["low"] is None else one["value"] - one["low"] for one in found]
    high = [0.0 if one["high"] is None else one["high"] - one["value"] for one in found]
    axes.errorbar(at, values, yerr=[low, high], fmt="o", capsize=3, label=label)


def interval(estimate: Result) -> str:
    """A value with its interval."""
    if estimate["value"] is None:
        return "-"
    around = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{around}"


def delta(compared: Result) -> str:
    """A difference with its interval."""
    if compared["delta"] is None:
        return "-"
    around = "" if compared["low"] is None else f" [{compared['low']:+.3f}, {compared['high']:+.3f}]"
    return f"{compared['delta']:+.3f}{around}"


def p_value(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"
