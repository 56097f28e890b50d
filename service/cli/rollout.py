"""The command `episodic rollout`: its options, progress bar and output."""

import asyncio
import json
import shlex
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.cli.evaluate import print_evaluation
from service.cli.open_files import raise_limit
from service.cli.options import explained, no_service, program
from service.cli.rollout_table import print_table
from service.client import DEFAULT_URL, AsyncClient, ConnectionFailed, EpisodicError, Evaluation, Retry, Unavailable
from service.environments import describe
from service.rollout.environment import (
    EnvironmentFactory,
    UnusableEnvironment,
    load_description,
    search_working_folder,
)
from service.rollout.play import EpisodeRefused, Player, rollout
from service.rollout.report import Report
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
    policy: Annotated[
        str | None, typer.Option(help="Policy that plays. Default: the default policy of the service.")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Policies that play the same seeds, separated by commas, for example base,learned. They are compared "
            "with the first. `base` is the base model."
        ),
    ] = None,
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
    names = _policy_names(policy, policies)
    search_working_folder()
    raise_limit()
    temperature = 0.0 if temperature is None and profile is None else temperature
    run = Run(tuple(tag or ()), group, policy, profile, instructions, temperature, success_at)
    kwargs = json_object(env_kwargs)
    try:
        describe_as = load_description(describe_with) if describe_with else describe
        factory = EnvironmentFactory(env, kwargs, max_episode_steps, describe_as)
        numbers = {"episodes": episodes, "repeat": repeat, "concurrency": concurrency, "seed": seed}
        played = asyncio.run(_play(factory, run, names, url, retry_s, numbers))
    except (UnusableEnvironment, EpisodeRefused, EpisodicError) as error:
        typer.echo(f"Error: {explained(error)}", err=True)
        raise typer.Exit(1) from error
    export = _export_command(run, url)
    if as_json:
        typer.echo(json.dumps({**played.as_json(), "export_command": export}, allow_nan=False))
    else:
        print_table(played.reports)
        if played.evaluation:
            print_evaluation(played.evaluation)
        typer.echo(f"Run {run.run_id}. Export its episodes:\n  {export}")
    if any(report.failures for report in played.reports.values()):
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Played:
    """The report of each policy by name, and their comparison if there are several."""

    reports: dict[str, Report]
    evaluation: Evaluation | None = None

    def as_json(self) -> dict[str, Any]:
        reports = {name: report.as_json() for name, report in self.reports.items()}
        if self.evaluation is None:
            (only,) = reports.values()
            return only
        shared = {name: value for name, value in next(iter(reports.values())).items() if name in ("run_id", "tag")}
        compared = self.evaluation.model_dump(mode="json", by_alias=True)
        return {**shared, "policies": reports, "evaluation": compared}


def _policy_names(policy: str | None, policies: str | None) -> list[str]:
    """Returns the names in --policies; none if the option is not used."""
    if policies is None:
        return []
    names = [name.strip() for name in policies.split(",")]
    if policy is not None:
        raise typer.BadParameter("use either --policy or --policies", param_hint="--policies")
    if len(names) < 2 or "" in names or len(set(names)) < len(names):
        raise typer.BadParameter("expected at least two different names, separated by commas", param_hint="--policies")
    return names


async def _play(
    factory: EnvironmentFactory, run: Run, names: list[str], url: str, retry_s: float, numbers: dict[str, int]
) -> _Played:
    first = factory.make()  # reports a wrong id or argument before the service is called
    first.env.close()
    if note := getattr(first.text, "note", None):
        typer.echo(f"Note: {note}", err=True)
    api_key = client_key()
    async with _client(url, api_key, Retry(total_s=retry_s)) as client:
        await _find_service(client, url, api_key, retry_s)
        if not names:
            return _Played({"policy": await _play_with(client, factory, run, numbers)})
        names = await _resolved(client, names)
        reports = {
            name: await _play_with(client, factory, _run_of(run, name, numbers["repeat"]), numbers) for name in names
        }
        return _Played(reports, await client.evaluation(tag=run.tag, by="policy", baseline=names[0]))


async def _play_with(client: AsyncClient, factory: EnvironmentFactory, run: Run, numbers: dict[str, int]) -> Report:
    with _progress() as progress:
        num_games = {"random": numbers["episodes"], "policy": numbers["episodes"] * numbers["repeat"]}
        shown = {"random": "random", "policy": run.policy or "policy"}
        bars = {player: progress.add_task(shown[player], total=total) for player, total in num_games.items()}

        def advance(player: Player) -> None:
            progress.advance(bars[player])

        return await rollout(factory, client, run=run, on_episode=advance, **numbers)


async def _resolved(client: AsyncClient, names: list[str]) -> list[str]:
    """Returns the names with that of the base model in place of `base`, unless a policy has this name."""
    known = await client.policies()
    if _BASE in (policy.name for policy in known):
        return names
    base = next((policy.name for policy in known if policy.kind == "base"), _BASE)
    resolved = [base if name == _BASE else name for name in names]
    if len(set(resolved)) < len(resolved):
        detail = f"{_BASE!r} and {base!r} are the same policy, the base model"
        raise typer.BadParameter(detail, param_hint="--policies")
    return resolved


_BASE = "base"


def _run_of(run: Run, policy: str, repeat: int) -> Run:
    """Returns the part of a run that this policy plays. Repeated plays of a seed share a group for each policy."""
    group = f"{run.group or run.run_id}/{policy}" if repeat > 1 else run.group
    return replace(run, policy=policy, group=group)


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


def json_object(text: str, option: str = "--env-kwargs") -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"invalid JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text}", param_hint=option)
    return cast("dict[str, Any]", value)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _export_command(run: Run, url: str) -> str:
    """The command that exports exactly this run's episodes."""
    command = [program(), "export", "--tag", run.tag, "--format", "tokens", "--output", f"{run.run_id}.ndjson"]
    return shlex.join(command if url == DEFAULT_URL else [*command, "--url", url])
