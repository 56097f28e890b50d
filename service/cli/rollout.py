"""The command `episodic rollout`: its options, progress bar and output."""

import asyncio
import json
from collections import Counter
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.client import DEFAULT_URL, AsyncClient, ConnectionFailed, EpisodicError, Retry
from service.rollout.environment import EnvironmentFactory, RewardNotFinite, UnusableEnvironment
from service.rollout.intervals import Interval
from service.rollout.play import Player, rollout
from service.rollout.report import Report, Summary
from service.settings import client_key

_LOAD_S = 600.0
"""Timeout in seconds until a running service is ready. It may still be loading its model."""


def rollout_command(
    env: Annotated[str, typer.Option(help="A Gymnasium environment id.")] = "episodic/FrozenLakeRandom-v0",
    episodes: Annotated[int, typer.Option(min=1, help="Number of episodes to play.")] = 200,
    concurrency: Annotated[int, typer.Option(min=1, help="Number of episodes to play at the same time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Episode i is reset with seed + i.")] = 0,
    env_kwargs: Annotated[str, typer.Option(help="Arguments of the environment, as a JSON object.")] = "{}",
    max_episode_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Truncate each episode after this many steps. Default: the environment's own limit, or else 200.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature. 0 is greedy.")] = 0.0,
    url: Annotated[str, typer.Option(envvar="EPISODIC_URL", help="Base URL of the service.")] = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Play episodes of a Gymnasium environment with the service's policy, and compare it with a random policy.

    The API key comes from EPISODIC_API_KEY. The exit code is 1 if an episode failed."""
    factory = EnvironmentFactory(env, _json_object(env_kwargs), max_episode_steps)
    try:
        report = asyncio.run(_play(factory, url, episodes, concurrency, seed, temperature))
    except (UnusableEnvironment, RewardNotFinite, EpisodicError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    print_json(report) if as_json else print_table(report)
    if report.failures:
        raise typer.Exit(1)


async def _play(
    factory: EnvironmentFactory,
    url: str,
    episodes: int,
    concurrency: int,
    seed: int,
    temperature: float,
) -> Report:
    factory.make().env.close()  # reports a wrong id or argument before the service is called
    api_key = client_key()
    async with _client(url, api_key) as client:
        await _find_service(client, url, api_key)
        with _progress() as progress:
            bars = {player: progress.add_task(player, total=episodes) for player in ("random", "policy")}

            def advance(player: Player) -> None:
                progress.advance(bars[player])

            return await rollout(
                factory,
                client,
                episodes=episodes,
                concurrency=concurrency,
                seed=seed,
                temperature=temperature,
                on_episode=advance,
            )


async def _find_service(client: AsyncClient, url: str, api_key: str | None) -> None:
    """Waits until the service is ready. Raises ConnectionFailed at once if nothing answers at the URL."""
    try:
        async with AsyncClient(url, api_key, timeout_s=10.0, retry=Retry(max_retries=0)) as impatient:
            await impatient.version()
    except ConnectionFailed as error:
        hint = "start one with `episodic serve`, or set --url"
        raise ConnectionFailed(f"no service answers at {url} ({error.__cause__}): {hint}") from error
    await client.wait_ready(_LOAD_S)


def _client(url: str, api_key: str | None) -> AsyncClient:
    try:
        return AsyncClient(url, api_key)
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


def print_json(report: Report) -> None:
    typer.echo(json.dumps(report.as_json(), allow_nan=False))


def print_table(report: Report) -> None:
    table = Table(title=f"{report.env}, seeds {report.seed} to {report.seed + _num_played(report) - 1}")
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
    console.print("[dim]95% confidence intervals: Wilson for the rate, Student's t for the mean.[/dim]")
    for reason, count in report.cut.items():
        console.print(f"{count} cut short: {reason}", style="yellow", markup=False)
    for error, count in Counter(failure.error for failure in report.failures).most_common(_MAX_ERRORS):
        console.print(f"{count} failed: {error}", style="red", markup=False)


_MAX_ERRORS = 10
_LABELS = ("episodes", "completion rate", "mean return", "mean length")


def _cells(summary: Summary) -> tuple[str, str, str, str]:
    return (
        str(summary.episodes),
        _with_interval(summary.completion_rate, summary.completion_rate_ci95),
        _with_interval(summary.mean_return, summary.mean_return_ci95),
        _number(summary.mean_length),
    )


def _with_interval(value: float | None, interval: Interval | None) -> str:
    return _number(value) if interval is None else f"{_number(value)} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _num_played(report: Report) -> int:
    return report.policy.episodes + len(report.failures)
