"""The curves of a training run: a CSV file with a row for each optimizer step, and a plot of it.

`python -m training.curves FILE.csv` draws the plot again.
"""

import csv
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.files import complete_file

Stage = Literal["pretraining", "fine-tuning"]

CSV, PLOT = "curves.csv", "curves.png"
REACHED = "goal_reached"
"""The column with the fraction of held-out maps whose goal was reached. It is empty except at checkpoints."""


class Curves(AbstractContextManager["Curves"]):
    """Writes the CSV file while the training runs.

    The columns are `step`, `stage`, `tokens` and `seconds` since the start, the loss of each world, and `goal_reached`.
    A step trains on two of the worlds, so the columns of the others are empty.
    """

    def __init__(self, path: Path, worlds: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, ["step", "stage", "tokens", "seconds", *worlds, REACHED])
        self._rows.writeheader()
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, step: int, stage: Stage, tokens: int, losses: Mapping[str, float], reached: float | None) -> None:
        """Writes the row of an optimizer step."""
        seconds = f"{time.monotonic() - self._started:.1f}"
        values = {name: f"{loss:.5f}" for name, loss in losses.items()}
        row = {"step": step, "stage": stage, "tokens": tokens, "seconds": seconds, **values}
        self._rows.writerow(row if reached is None else {**row, REACHED: f"{reached:.4f}"})
        self._file.flush()


def plot(path: Path, out: Path) -> bool:
    """Draws the CSV file `path` as a PNG file. Returns False if matplotlib is not installed."""
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn: Any = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    figure, (losses, success) = drawn
    _draw_losses(losses, rows)
    _draw_success(success, rows)
    with complete_file(out) as file:
        figure.savefig(file, format="png", dpi=80)
    pyplot.close(figure)
    return True


def _draw_losses(axes: Any, rows: list[dict[str, str]]) -> None:
    worlds = [name for name in rows[0] if name not in {"step", "stage", "tokens", "seconds", REACHED}]
    for world in worlds:
        axes.plot(*_points(rows, world), linewidth=0.8, label=world)
    axes.set(ylabel="loss (nats per token or action)", title="Training of the packaged policy")
    axes.set(yscale="log", ylim=(1e-3, None))  # games that are solved have losses near 0
    _mark_stages(axes, rows)
    axes.legend(fontsize="small")


def _draw_success(axes: Any, rows: list[dict[str, str]]) -> None:
    axes.plot(*_points(rows, REACHED), "o-", color="black")
    axes.set(xlabel="optimizer step", ylabel="goal reached, held-out maps", ylim=(-0.03, 1.03))
    _mark_stages(axes, rows)


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    known = [row for row in rows if row[column]]
    return [int(row["step"]) for row in known], [float(row[column]) for row in known]


def _mark_stages(axes: Any, rows: list[dict[str, str]]) -> None:
    pretrained = [int(row["step"]) for row in rows if row["stage"] == "pretraining"]
    if pretrained:
        axes.axvspan(0, pretrained[-1], color="0.9", label="pretraining")
    axes.grid(alpha=0.3)


def draw(
    path: Annotated[Path, typer.Argument(help="The CSV file of a training run.", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="The PNG file. [default: beside the CSV file]")] = None,
) -> None:
    """Draw the curves of a training run."""
    target = path.with_suffix(".png") if out is None else out
    if not plot(path, target):
        typer.echo("Error: the plot needs matplotlib. Run `make install`.", err=True)
        raise typer.Exit(1)
    typer.echo(f"Wrote {target}.")


if __name__ == "__main__":
    typer.run(draw)
