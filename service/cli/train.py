"""The command `episodic train`: its options, its progress, and how it ends.

torch is imported inside the function, so that the other commands start quickly.
"""

import json
import os.path
import shlex
import signal
import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Unpack

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from service.cli.episodes import service_at, with_options
from service.cli.options import fail, finite, program, read_settings
from service.client import DEFAULT_URL
from service.filters import FILTERS, EpisodeFilter
from service.learning import NOTHING_TO_LEARN, NothingToLearn, TrainingInterrupted, TrainingRefused
from service.learning.imitation import parse_keep
from service.learning.options import (
    ALPHA,
    LEARNING_RATES,
    MAX_LEARNING_RATE,
    MAX_SEED,
    RANK,
    USED_BY,
    Device,
    Dtype,
    GroupBy,
    Method,
    Options,
    Reference,
    Score,
    unused,
)
from service.learning.partial import CHECKPOINT, partial_folder

_REPORT_S = 10.0
"""Seconds between two lines of progress, if the output is not a terminal."""


def _rules(given: list[str] | None) -> list[str]:
    for rule in given or []:
        try:
            parse_keep(rule)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return given or []


def _refuse_unused(context: typer.Context, method: Method) -> None:
    """Refuses an option of another method, which would have no effect."""
    sources = {option: context.get_parameter_source(option[2:].replace("-", "_")) for option in USED_BY}
    given = [option for option, source in sources.items() if source and source.name == "COMMANDLINE"]
    if reason := unused(method, given):
        raise typer.BadParameter(reason)


@with_options(FILTERS)
def train_command(
    context: typer.Context,
    method: Annotated[
        Method,
        typer.Option(
            help="bc: imitate the kept actions. dpo: prefer the better episode of each pair. grpo: make actions more "
            "likely that led to returns above the mean of their group, and others less likely."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the adapter.")],
    source: Annotated[
        str,
        typer.Option(
            "--from", envvar="EPISODIC_URL", help="Export with --format tokens, or the base URL of a service."
        ),
    ] = DEFAULT_URL,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            callback=_rules,
            help="bc: what to imitate: success, top:FRACTION (the best of each group), recorded (actions of others), "
            "rated (weighted by rating). May be repeated. [default: success]",
        ),
    ] = None,
    score: Annotated[Score, typer.Option(help="dpo: what to compare episodes by.")] = "return",
    model: Annotated[
        str | None, typer.Option(help="The base model (EPISODIC_MODEL). By default the packaged policy.")
    ] = None,
    init_adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter to train further.", exists=True, file_okay=False)
    ] = None,
    rehearse: Annotated[
        Path | None,
        typer.Option(
            help="Export with --format tokens of what the policy must not unlearn: each step also imitates some of it.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    any_version: Annotated[
        bool, typer.Option(help="Accept episodes of other policy versions than the one that training starts from.")
    ] = False,
    allow_filtered: Annotated[
        bool, typer.Option(help="grpo: accept tokens that were drawn from an unknown part of the vocabulary.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Number of passes over the data.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Segments, or pairs (dpo), in one optimizer step.")] = 32,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Compute a batch in parts of this many tokens. Less needs less memory.")
    ] = 4096,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=MAX_LEARNING_RATE,
            callback=finite,
            help=f"Peak learning rate. [default: {', '.join(f'{k} {v:g}' for k, v in LEARNING_RATES.items())}]",
        ),
    ] = None,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Optimizer steps until the peak learning rate.")] = 5,
    rank: Annotated[
        int | None, typer.Option(min=1, help=f"Rank of a new adapter. An initial one keeps its own. [default: {RANK}]")
    ] = None,
    alpha: Annotated[
        int | None, typer.Option(min=1, help=f"The scale of a new adapter is alpha / rank. [default: {ALPHA}]")
    ] = None,
    beta: Annotated[float, typer.Option(min=0.0, callback=finite, help="dpo: inverse temperature.")] = 0.1,
    group_by: Annotated[
        GroupBy,
        typer.Option(
            help="Which episodes are compared. seed: those of one group, or of the same environment and seed. start: "
            "those that begin with the same prompt."
        ),
    ] = "seed",
    discount: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            callback=finite,
            help="grpo: score each step by the discounted return from it on. [default: by that of its episode]",
        ),
    ] = None,
    clip: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, callback=finite, help="grpo: limit of the probability ratio, 1 - and 1 +."),
    ] = 0.2,
    max_ratio: Annotated[
        float, typer.Option(min=1.0, callback=finite, help="grpo: importance weights are truncated at this.")
    ] = 3.0,
    kl: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="grpo: weight of the KL divergence from the reference.")
    ] = 0.0,
    reference: Annotated[
        Reference, typer.Option(help="dpo, and grpo with --kl: compare with the base model, or the initial adapter.")
    ] = "base",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the order of the data and of a new adapter.")
    ] = 0,
    device: Annotated[Device, typer.Option(help="Where to train.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format of the base model.")] = "float32",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints.")] = 50,
    resume: Annotated[bool, typer.Option(help="Continue an unfinished run, with the options of its start.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the adapter's card as one JSON object.")] = False,
    **where: Unpack[EpisodeFilter],
) -> None:
    """Train a LoRA adapter of the base model on episodes, and write it to a folder that PUT /policy/NAME loads.

    SIGTERM and Ctrl+C write a checkpoint first: repeat the command with --resume. The exit code is 3 if the episodes
    contain nothing to learn from. The API key comes from EPISODIC_API_KEY."""
    _refuse_unused(context, method)
    options = Options(
        method=method,
        keep=tuple(keep or ["success"]),
        score=score,
        reference=reference,
        beta=beta,
        group_by=group_by,
        discount=discount,
        clip=clip,
        max_ratio=max_ratio,
        kl=kl,
        rank=rank,
        alpha=alpha,
        learning_rate=LEARNING_RATES[method] if learning_rate is None else learning_rate,
        warmup_steps=warmup_steps,
        epochs=epochs,
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        seed=seed,
        allow_filtered=allow_filtered,
        any_version=any_version,
        dtype=dtype,
    )
    settings = read_settings({"model": model})
    try:
        from service.learning.run import Base, train
    except ImportError as error:
        fail(f"training needs PyTorch and transformers ({error}). Run `make install`.", code=1)
    base = Base(settings.model_path, settings.served_name, settings.data / "weights.json", init_adapter)
    stop = _Stop()
    is_complete = os.path.exists(out)  # Path.exists raises OSError for a name that is too long
    try:
        with _opened(source, where) as export, stop, _Watcher() as watcher:
            card = train(
                options,
                export,
                base,
                out,
                where=where,
                rehearse=rehearse,
                resume=resume,
                device=device,
                checkpoint_every=checkpoint_every,
                watcher=watcher,
                should_stop=stop.is_asked,
            )
    except NothingToLearn as error:
        fail(str(error), code=NOTHING_TO_LEARN)
    except TrainingRefused as error:
        fail(str(error), code=1)
    except TrainingInterrupted:
        typer.echo(f"Stopped by {stop.name}. {_how_to_continue(out)}", err=True)
        raise typer.Exit(128 + stop.number) from None
    if as_json:
        typer.echo(json.dumps(card))
    elif is_complete:
        typer.echo(f"{out} is already complete: it has version {card['policy_version']}. Nothing was trained.")
    else:
        _print(card, out)


@contextmanager
def _opened(source: str, where: EpisodeFilter) -> Generator[Any]:
    """The file, or a function that exports from the service at this URL."""
    if not source.startswith(("http://", "https://")):
        yield Path(source)
        return
    with service_at(source) as client:
        yield lambda: client.export("tokens", **where)


def _how_to_continue(out: Path) -> str:
    work = partial_folder(out)
    if not (work / CHECKPOINT).exists():
        return "Training had not begun. Nothing was written."
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return f"A checkpoint is in {work}. Continue with:\n  {shlex.join([program(), *arguments, '--resume'])}"


class _Stop(AbstractContextManager["_Stop"]):
    """Notes SIGTERM and SIGINT, in place of ending the process. The second one ends it."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def is_asked(self) -> bool:
        return self.number != 0

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number


class _Watcher(AbstractContextManager["_Watcher"]):
    """Prints to stderr: a progress bar on a terminal, otherwise a line from time to time."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task: TaskID | None = None
        self._printed_at = 0.0

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, text: str) -> None:
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"Warning: {text}", style="yellow", markup=False)

    def step(self, progress: Any) -> None:
        text = f"{figures(progress.figures)}, {progress.tokens_per_s:,.0f} tokens/s"
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=progress.num_steps)
        self._bar.update(self._task, completed=progress.step, description=text)
        is_due = time.monotonic() - self._printed_at >= _REPORT_S or progress.step == progress.num_steps
        if not self._console.is_terminal and is_due:
            self._printed_at = time.monotonic()
            typer.echo(f"step {progress.step} of {progress.num_steps}: {text}", err=True)


_SHOWN = {
    "loss": "loss",
    "rehearsal_loss": "rehearsal",
    "reference_kl": "KL to reference",
    "kl": "KL",
    "ratio": "ratio",
    "ratio_max": "max",
    "clipped": "clipped",
    "advantage": "advantage",
    "pair_accuracy": "accuracy",
    "pair_margin": "margin",
}


def figures(values: dict[str, float]) -> str:
    """The figures of an optimizer step as text."""
    return ", ".join(f"{label} {values[name]:.3g}" for name, label in _SHOWN.items() if name in values)


def _print(card: dict[str, Any], out: Path) -> None:
    last: dict[str, float | None] = card["metrics"]["epochs"][-1]
    start = card["metrics"]["start"]["mean_abs_delta_logprob"]
    known = {name: value for name, value in last.items() if value is not None}
    typer.echo(f"{card['metrics']['steps']} steps in {card['metrics']['seconds']:g} s. Last epoch: {figures(known)}")
    if start is not None:
        typer.echo(f"Stored and recomputed log-probabilities differed by {start:.4f} on average before the first step.")
    typer.echo(f"Wrote version {card['policy_version']} to {out}. To serve it, copy the folder into EPISODIC_ADAPTERS:")
    typer.echo(
        f"  curl -X PUT $EPISODIC_URL/policy/NAME -H 'Content-Type: application/json' -d '{{\"path\": \"{out.name}\"}}'"
    )
