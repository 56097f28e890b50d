"""The commands `episodic episodes` and `episodic export`, which read from a running service.

The API key comes from EPISODIC_API_KEY.
"""

import inspect
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Unpack

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service.cli.options import explained, no_service
from service.client import DEFAULT_URL, Client, ConnectionFailed, EpisodeResource, EpisodicError
from service.files import complete_file
from service.filters import FILTERS, ORDERS, EpisodeFilter, EpisodeQuery, Time, unix_seconds
from service.settings import client_key
from service.validation import strict_json

Url = Annotated[str, typer.Option(envvar="EPISODIC_URL", help="Base URL of the service.")]

Command = Callable[..., None]


def with_options(declared: dict[str, tuple[Any, str]]) -> Callable[[Command], Command]:
    """Adds an option to the command for each declared filter. The command receives the used ones as `**where`."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def filtered(*args: Any, **options: Any) -> None:
            where = {name: options.pop(name) for name in declared}
            if "metadata" in where:
                where["metadata"] = _pairs(where["metadata"])
            command(*args, **options, **{name: value for name, value in where.items() if value is not None})

        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [_option(name, kind, text) for name, (kind, text) in declared.items()]
        filtered.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined] - Typer reads it
        filtered.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
        return filtered

    return decorate


def _option(name: str, kind: Any, text: str) -> inspect.Parameter:
    check = None
    if kind == Time:
        kind, check = str, _checked_time
    elif name == "metadata":
        kind, check, text = list[str], _checked_pairs, f"{text} KEY=VALUE; can be repeated."
    annotation = Annotated[kind | None, typer.Option(help=text, callback=check)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _checked_time(text: str | None) -> str | None:
    try:
        if text is not None:
            unix_seconds(text)
    except (ValueError, OverflowError) as error:
        detail = f"{text!r} is not a point in time. Use ISO 8601, for example 2030-01-31T12:00:00Z, or Unix seconds."
        raise typer.BadParameter(detail) from error
    return text


def _checked_pairs(given: list[str] | None) -> list[str] | None:
    _pairs(given)
    return given


def _pairs(given: list[str] | None) -> dict[str, str] | None:
    pairs = [pair.partition("=") for pair in given or ()]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise typer.BadParameter(f"expected KEY=VALUE, got {key!r}", param_hint="--metadata")
    return {key: value for key, _, value in pairs} or None


@with_options({**FILTERS, **ORDERS})
def episodes_command(
    url: Url = DEFAULT_URL,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of episodes to list.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    **where: Unpack[EpisodeQuery],
) -> None:
    """List episodes, by default the newest first. Times are in UTC, and in JSON Unix seconds as in the HTTP API."""
    with service_at(url) as client:
        found = islice(client.episodes(**where), limit)
        if as_json:
            for episode in found:
                typer.echo(episode.model_dump_json())
            return
        _print_table(found)


_NARROW = 110
"""Below this width of the terminal, the table leaves out columns, so that 80 are enough for most episodes."""


def _print_table(found: Iterable[EpisodeResource]) -> None:
    console = Console(width=None if sys.stdout.isatty() else UNLIMITED)
    is_narrow = console.width < _NARROW
    cells = _narrow_cells if is_narrow else _wide_cells
    names = ("status", "success", "steps", "return", "created UTC", *(() if is_narrow else ("policy", "env", "group")))
    table = Table(Column("episode", overflow="fold"), box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True)
    for episode in found:
        table.add_row(*map(escape, cells(episode)))
    if table.row_count:
        console.print(table)
    else:
        typer.echo("no episodes", err=True)


UNLIMITED = 10_000
"""Width of a table that is not written to a terminal, for `grep` and the like."""


def _narrow_cells(episode: EpisodeResource) -> list[str]:
    success = {True: "yes", False: "no", None: ""}[episode.success]
    created = episode.created_at.astimezone(UTC) if episode.created_at else None
    state = episode.stop_reason or episode.status
    when = f"{created:%m-%d %H:%M}" if created else ""
    return [episode.episode_id, state, success, str(episode.step), f"{episode.episode_return:g}", when]


def _wide_cells(episode: EpisodeResource) -> list[str]:
    *cells, _ = _narrow_cells(episode)
    created = episode.created_at.astimezone(UTC) if episode.created_at else None
    when = f"{created:%Y-%m-%d %H:%M:%S}" if created else ""
    env = (episode.metadata or {}).get("env")
    return [*cells, when, episode.policy or "", env if isinstance(env, str) else "", episode.group or ""]


@with_options(FILTERS)
def export_command(
    output: Annotated[str, typer.Option(help="File to write, or - for standard output.")] = "-",
    format: Annotated[Literal["steps", "messages", "tokens"], typer.Option(help="Format of the export.")] = "steps",
    url: Url = DEFAULT_URL,
    **where: Unpack[EpisodeFilter],
) -> None:
    """Write trajectories as NDJSON, one per line. The file is created only when the export is complete."""
    count = 0
    with service_at(url) as client, _open_output(output) as out:
        for document in client.export(format, **where):
            out.write(strict_json.write(document) + b"\n")
            count += 1
    typer.echo(f"{count} trajectories", err=True)


def _open_output(output: str) -> AbstractContextManager[BinaryIO]:
    """Opens the output. A file gets its name when it is complete."""
    return nullcontext(sys.stdout.buffer) if output == "-" else complete_file(Path(output))


@contextmanager
def service_at(url: str) -> Generator[Client]:
    """A client of the service at the URL. Prints expected errors in one line, and exits with code 1.

    If nothing answers at the URL, says so at once: the client itself would wait for a service that restarts.
    """
    try:
        with Client(url, client_key()) as client:
            require_answer(url)
            yield client
    except (EpisodicError, OSError, ValueError, httpx.InvalidURL) as error:
        typer.echo(f"Error: {explained(error)}", err=True)
        raise typer.Exit(1) from error


def require_answer(url: str) -> None:
    """Raises ConnectionFailed if nothing answers at the URL."""
    try:
        httpx.get(f"{url.rstrip('/')}/healthz", timeout=_ANSWER_S)
    except httpx.TransportError as error:
        raise ConnectionFailed(no_service(url, error)) from error


_ANSWER_S = 10.0
