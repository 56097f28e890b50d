"""The command `episodic learn`: its options, its table of rounds, and how it ends."""

import importlib.util
import json
import shlex
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Self

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from service.cli.episodes import require_answer
from service.cli.open_files import raise_limit
from service.cli.options import explained, fail, finite, program
from service.cli.rollout import json_object
from service.cli.train_args import parse_train_args
from service.client import DEFAULT_URL, EpisodicError
from service.evaluation.statistics import MIN_PAIRS
from service.learning import NEEDS_PEFT
from service.learning.options import MAX_LEARNING_RATE, Method
from service.loop import LearningFailed, report
from service.loop.plan import Metric, Plan
from service.loop.playing import Service
from service.loop.rounds import describe_final, learn
from service.loop.state import Result, Round, State
from service.rollout import UnusableEnvironment
from service.rollout.environment import search_working_folder
from service.rollout.play import EpisodeRefused
from service.settings import client_key


def learn_command(
    env: Annotated[str, typer.Option(help="A Gymnasium environment id, or MODULE:ID if MODULE registers it.")],
    out: Annotated[Path, typer.Option(help="Folder of the run. The same command continues a run that was cut.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the policy that learns. [default: the name of the folder]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Maximum number of rounds.")] = 5,
    patience: Annotated[int, typer.Option(min=1, help="Stop after this many rounds without a better policy.")] = 2,
    method: Annotated[Method, typer.Option(help="How to train: see `episodic train`.")] = "grpo",
    episodes: Annotated[int, typer.Option(min=1, help="Number of training seeds in each round.")] = 200,
    repeat: Annotated[int, typer.Option(min=1, help="Play each training seed this many times.")] = 8,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="Sampling temperature in training.")
    ] = 1.0,
    last_temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            callback=finite,
            help="That of the last round. It changes by the same factor in each round. [default: the first]",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=MAX_LEARNING_RATE,
            callback=finite,
            help="Peak learning rate of the first round. It falls with the temperature. [default: that of the method]",
        ),
    ] = None,
    selection: Annotated[
        int, typer.Option(min=MIN_PAIRS, help="Number of seeds that compare a candidate with the best policy.")
    ] = 200,
    final: Annotated[int, typer.Option(min=MIN_PAIRS, help="Number of seeds in the final test.")] = 500,
    train_seed: Annotated[int, typer.Option(min=0, help="The first seed for training.")] = 0,
    selection_seed: Annotated[int, typer.Option(min=0, help="The first seed for selection.")] = 1_000_000_000,
    final_seed: Annotated[int, typer.Option(min=0, help="The first seed for the final test.")] = 2_000_000_000,
    env_kwargs: Annotated[str, typer.Option(help="Arguments of the environment, as a JSON object.")] = "{}",
    test_kwargs: Annotated[
        str | None, typer.Option(help="The same for selection and the final test. [default: those of training]")
    ] = None,
    max_episode_steps: Annotated[
        int | None, typer.Option(min=1, help="Truncate each episode after this many steps.")
    ] = None,
    describe_with: Annotated[
        str | None, typer.Option("--describe", help="MODULE:CLASS that describes the environment as text.")
    ] = None,
    instructions: Annotated[str | None, typer.Option(help="System message for the policy.")] = None,
    success_at: Annotated[
        float | None, typer.Option(callback=finite, help="An episode is a success if its return is at least this.")
    ] = None,
    metric: Annotated[
        Metric, typer.Option(help="Compare by this. auto: completion if the success of every episode is known.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the training.")] = 0,
    train_args: Annotated[
        str, typer.Option(help="Further options of `episodic train`, for example '--epochs 2 --batch-size 16'.")
    ] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Number of episodes to play at the same time.")] = 64,
    retry_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds to retry a call while the service is down, loading or overloaded.")
    ] = 600.0,
    url: Annotated[str, typer.Option(envvar="EPISODIC_URL", help="Base URL of the service.")] = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Improve the policy by its own episodes: roll out, train, compare, and move the alias if the result is better.

    The service must allow adapters (EPISODIC_ADAPTERS). EPISODIC_API_KEY is a key with the scopes act, read and admin.
    EPISODIC_MODEL is the base model that the service serves, by default the packaged policy."""
    if last_temperature is not None and not temperature:
        raise typer.BadParameter("needs a --temperature above 0", param_hint="--last-temperature")
    if importlib.util.find_spec("peft") is None:
        fail(NEEDS_PEFT, code=1)
    search_working_folder()
    raise_limit()
    plan = Plan(
        env=env,
        name=out.resolve().name if name is None else name,
        env_kwargs=json_object(env_kwargs),
        test_kwargs=None if test_kwargs is None else json_object(test_kwargs, "--test-kwargs"),
        max_episode_steps=max_episode_steps,
        describe=describe_with,
        instructions=instructions,
        success_at=success_at,
        rounds=rounds,
        patience=patience,
        seeds=episodes,
        repeat=repeat,
        temperature=temperature,
        last_temperature=last_temperature,
        learning_rate=learning_rate,
        selection=selection,
        final=final,
        train_seed=train_seed,
        selection_seed=selection_seed,
        final_seed=final_seed,
        metric=metric,
        method=method,
        seed=seed,
        train_args=parse_train_args(train_args, method),
    )
    service = Service(url, client_key(), retry_s, concurrency)
    try:
        plan.ranges()  # reports overlaps before the service is called
        require_answer(url)
        with _stoppable(), _View() as view:
            found = learn(plan, service, out, watcher=view)
    except (LearningFailed, UnusableEnvironment, EpisodeRefused, EpisodicError) as error:
        fail(explained(error), code=1)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. Continue with:\n  {shlex.join([program(), *sys.argv[1:]])}", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}. Repeat the command to continue.", code=1)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print_end(found, out)


@contextmanager
def _stoppable() -> Generator[None]:
    """Lets SIGTERM do the same as Ctrl+C: a training ends with a checkpoint, and a rollout ends its episodes."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)  # asyncio cancels its tasks on this signal

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_REPORT_S = 15.0
"""Seconds between two lines of progress, if the output is not a terminal."""


class _View:
    """Prints to stderr: a table that changes on a terminal, otherwise lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._state: State | None = None
        self._phase = ""
        self._printed: set[str] = set()
        self._printed_at = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._phase = ""
            self._show("")
            self._live.stop()

    def started(self, state: State) -> None:
        self._state = state
        for name, (first, stop) in state.seeds.items():
            self._console.print(f"Seeds for {name}: {first} to {stop - 1}")
        self.changed(state)

    def phase(self, text: str) -> None:
        self._phase, self._printed_at = text, time.monotonic()
        self._line(text)
        self._show("")

    def progress(self, done: int, total: int) -> None:
        self._detail(f"{done} of {total} episodes", is_last=done == total)

    def training(self, line: str) -> None:
        self._detail(line, is_last=False)

    def changed(self, state: State) -> None:
        self._state = state
        for played in state.rounds:
            row = " | ".join(cell for cell in _cells(played, state) if cell)
            if played.is_complete and row not in self._printed:
                self._printed.add(row)
                self._line(f"round {row}")
        self._show("")

    def _detail(self, text: str, *, is_last: bool) -> None:
        self._show(text)
        if is_last or time.monotonic() - self._printed_at >= _REPORT_S:
            self._printed_at = time.monotonic()
            self._line(f"{self._phase}: {text}")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            typer.echo(text, err=True)

    def _show(self, detail: str) -> None:
        if self._console.is_terminal and self._state is not None:
            line = Text(f"{self._phase}  {detail}".strip(), style="dim", no_wrap=True, overflow="ellipsis")
            self._live.update(Group(_table(self._state), line), refresh=True)


_COLUMNS = ("round", "sampled", "training", "candidate", "best before", "difference", "p", "verdict", "alias")


def _table(state: State) -> Table:
    table = Table(title=f"{state.plan['name']} on {state.plan['env']}, {state.plan['method']}")
    for column in _COLUMNS:
        table.add_column(column)
    for played in state.rounds:
        table.add_row(*_cells(played, state))
    return table


def _cells(played: Round, state: State) -> tuple[str, ...]:
    phases = played.phases
    selected = phases.get("select")
    head = (str(played.number), _sampled(phases.get("rollout")), _trained(phases.get("train")))
    if selected is None:
        return (*head, *[""] * (len(_COLUMNS) - len(head)))
    sides = (report.interval(selected["candidate"]), report.interval(selected["baseline"]))
    alias = ""
    if "decide" in phases:
        alias = f"-> {phases['load']['version']}" if played.is_promoted else "unchanged"
    return (*head, *sides, report.delta(selected), report.p_value(selected["p"]), selected["verdict"], alias)


def _sampled(rollout: Result | None) -> str:
    if rollout is None:
        return ""
    completion = rollout["completion_rate"]
    shown = "" if completion is None else f"completion {completion:.3f}, "
    return f"{shown}return {rollout['mean_return']:.3f}"


_FIGURES = {"loss": "loss", "kl": "KL", "ratio": "ratio"}


def _trained(trained: Result | None) -> str:
    if trained is None:
        return ""
    if "refused" in trained:
        return f"nothing to learn: {trained['refused']}"
    last = trained["last_epoch"]
    return ", ".join(f"{label} {last[key]:.3g}" for key, label in _FIGURES.items() if last.get(key) is not None)


def _print_end(found: Result, out: Path) -> None:
    final: Any = found["final"]
    if final is None:
        typer.echo(
            f"No round found a better policy than the base model ({found['seconds']:.0f} s). Nothing was changed."
        )
    else:
        typer.echo(f"{found['name']} is {found['best']['policy']}, of round {found['best']['round']}.")
        typer.echo(f"Final test: {describe_final(final)} ({found['seconds'] / 60:.1f} minutes in all).")
    drawn = f" and {report.PLOT}" if found["plot"] else ". There is no plot: install matplotlib for one"
    typer.echo(f"{out} has {report.REPORT}{drawn}.")
