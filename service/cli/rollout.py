"""The command `episodic rollout`: its options, progress bar and output."""

import asyncio
import json
import shlex
from collections import Counter
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.cli.open_files import raise_limit
from service.cli.options import explained, no_service, program
from service.client import DEFAULT_URL, AsyncClient, ConnectionFailed, EpisodicError, Retry, Unavailable
from service.environments import describe
from service.evaluation.statistics import Interval
from service.rollout.environment import (
    EnvironmentFactory,
    UnusableEnvironment,
    load_description,
    search_working_folder,
)
from service.rollout.play import EpisodeRefused, Player, rollout
from service.rollout.report import Report, Summary
from service.rollout.run import Run
from service.settings import client_key


def rollout_command(
    env: Annotated[
        str, typer.Option(help="A Gymnasium environment id, or MODULE:ID if MODULE registers it.")
    ] = "episodic/FrozenLakeRandom-v0",
    episodes: Annotated[int, typer.Option(min=1, help="Number of seeds to play.")] = 200,
    repeat: Annotated[
        int, typer.Option(min=1, help="Play each seed this many times. The plays of a seed have a group of their own.")
    ] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Number of episodes to play at the same time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="The first seed. The others follow it.")] = 0,
    env_kwargs: Annotated[str, typer.Option(help="Arguments of the environment, as a JSON object.")] = "{}",
    max_episode_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Truncate each episode after this many steps. Default: the environment's own limit, or else 200.",
        ),
    ] = None,
    describe_with: Annotated[
        str | None,
        typer.Option("--describe", help="MODULE:CLASS that describes the environment as text."),
    ] = None,
    instructions: Annotated[
        str | None, typer.Option(help="System message for the policy, in place of the description's.")
    ] = None,
    success_at: Annotated[
        float | None, typer.Option(help="An episode is a success if its return is at least this.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Policy that plays. Default: the base model.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile of the episodes. Its instructions and sampling are used.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Sampling temperature. 0 is greedy. Default: 0, or the profile's.", show_default=False
        ),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Further tag of the episodes. May be repeated.")] = None,
    group: Annotated[str | None, typer.Option(help="Group of the episodes.")] = None,
    retry_s: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds to retry a call while the service is down, loading or overloaded."),
    ] = 600.0,
    url: Annotated[str, typer.Option(envvar="EPISODIC_URL", help="Base URL of the service.")] = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Play episodes of a Gymnasium environment with the service's policy, and compare it with a random policy.

    The API key comes from EPISODIC_API_KEY. The exit code is 1 if an episode failed."""
    search_working_folder()
    raise_limit()
    temperature = 0.0 if temperature is None and profile is None else temperature
    run = Run(tuple(tag or ()), group, policy, profile, instructions, temperature, success_at)
    kwargs = _json_object(env_kwargs)
    try:
        describe_as = load_description(describe_with) if describe_with else describe
        factory = EnvironmentFactory(env, kwargs, max_episode_steps, describe_as)
        numbers = {"episodes": episodes, "repeat": repeat, "concurrency": concurrency, "seed": seed}
        report = asyncio.run(_play(factory, run, url, retry_s, numbers))
    except (UnusableEnvironment, EpisodeRefused, EpisodicError) as error:
        typer.echo(f"Error: {explained(error)}", err=True)
        raise typer.Exit(1) from error
    export = _export_command(run, url)
    if as_json:
        typer.echo(json.dumps({**report.as_json(), "export_command": export}, allow_nan=False))
    else:
        print_table(report)
        typer.echo(f"Run {run.run_id}. Export its episodes:\n  {export}")
    if report.failures:
        raise typer.Exit(1)


async def _play(factory: EnvironmentFactory, run: Run, url: str, retry_s: float, numbers: dict[str, int]) -> Report:
    first = factory.make()  # reports a wrong id or argument before the service is called
    first.env.close()
    if note := getattr(first.text, "note", None):
        typer.echo(f"Note: {note}", err=True)
    api_key = client_key()
    async with _client(url, api_key, Retry(total_s=retry_s)) as client:
        await _find_service(client, url, api_key, retry_s)
        with _progress() as progress:
            num_games = {"random": numbers["episodes"], "policy": numbers["episodes"] * numbers["repeat"]}
            bars = {player: progress.add_task(player, total=total) for player, total in num_games.items()}

            def advance(player: Player) -> None:
                progress.advance(bars[player])

            return await rollout(factory, client, run=run, on_episode=advance, **numbers)


async def _find_service(client: AsyncClient, url: str, api_key: str | None, retry_s: float) -> None:
    """Waits until the service is ready. Raises ConnectionFailed at once if nothing answers at the URL."""
    try:
        async with AsyncClient(url, api_key, timeout_s=10.0, retry=Retry(total_s=0)) as impatient:
            await impatient.version()
    except Unavailable:
        pass  # the service is there, and will be ready
    except ConnectionFailed as error:
        raise ConnectionFailed(no_service(url, error.__cause__)) from error
    await client.wait_ready(retry_s)


def _client(url: str, api_key: str | None, retry: Retry) -> AsyncClient:
    try:
        return AsyncClient(url, api_key, retry=retry)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"invalid JSON: {error}", param_hint="--env-kwargs") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text}", param_hint="--env-kwargs")
    return cast("dict[str, Any]", value)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _export_command(run: Run, url: str) -> str:
    """The command that exports exactly this run's episodes."""
    command = [program(), "export", "--tag", run.tag, "--format", "tokens", "--output", f"{run.run_id}.ndjson"]
    return shlex.join(command if url == DEFAULT_URL else [*command, "--url", url])


def print_table(report: Report) -> None:
    table = Table(title=f"{report.env}, seeds {report.seed} to {report.seed + report.num_seeds - 1}")
    for name in ("", "policy", "random"):
        table.add_column(name, justify="left" if not name else "right")
    for label, policy, random in zip(_LABELS, _cells(report.policy), _cells(report.random), strict=True):
        table.add_row(label, policy, random)
    table.add_section()
    table.add_row("steps/s", f"{report.steps_per_s:.1f}", "")
    table.add_row("/act p50", _milliseconds(report.p50_s), "")
    table.add_row("/act p99", _milliseconds(report.p99_s), "")
    console = Console()
    console.print(table)
    console.print(
        "[dim]95% confidence intervals: Wilson for the rate, Student's t for the mean.[/dim]", highlight=False
    )
    if num_unknown := report.policy.success_unknown:
        console.print(_UNKNOWN.format(num_unknown, report.policy.episodes), style="yellow", markup=False)
    for reason, count in report.ended_early.items():
        console.print(f"{count} ended early: {_REASONS[reason]}", style="yellow", markup=False)
    for error, count in Counter(failure.error for failure in report.failures).most_common(_MAX_ERRORS):
        console.print(f"{count} failed: {error}", style="red", markup=False)


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
