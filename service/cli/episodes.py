"""Owns the commands that read from a running service: `episodic episodes` and `episodic export`. Its key is in
EPISODIC_API_KEY."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import httpx
import orjson
import typer
from rich.console import Console
from rich.table import Column, Table

from service.client import DEFAULT_URL, Client, EpisodicError
from service.client.calls import Labels
from service.settings import client_key

Url = Annotated[str, typer.Option(envvar="EPISODIC_URL", help="Where the service is.")]
Tag = Annotated[str | None, typer.Option(help="Only those with this tag.")]
Group = Annotated[str | None, typer.Option(help="Only those of this group.")]
Policy = Annotated[str | None, typer.Option(help="Only those of this policy.")]
Profile = Annotated[str | None, typer.Option(help="Only those opened with this profile.")]
State = Annotated[Literal["active", "ended"] | None, typer.Option(help="Only these; an export has those that ended.")]

_COLUMNS = ("status", "steps", "return", "policy", "group", "created")


def episodes_command(
    url: Url = DEFAULT_URL,
    status: State = None,
    tag: Tag = None,
    group: Group = None,
    policy: Policy = None,
    profile: Profile = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List episodes, newest first."""
    with _errors(), Client(url, client_key()) as client:
        found = islice(client.episodes(**_labels(status, tag, group, policy, profile)), limit)
        if as_json:
            for episode in found:
                typer.echo(episode.model_dump_json())
            return
        table = Table(Column("episode", no_wrap=True, overflow="fold"), *_COLUMNS, box=None)
        for episode in found:
            state = f"{episode.status} ({episode.stop_reason})" if episode.stop_reason else episode.status
            created = episode.created_at.astimezone() if episode.created_at else datetime.fromtimestamp(0).astimezone()
            shown = (episode.episode_id, state, str(episode.step), f"{episode.episode_return:g}")
            table.add_row(*shown, episode.policy or "", episode.group or "", f"{created:%Y-%m-%d %H:%M:%S}")
        Console().print(table)


def export_command(
    output: Annotated[str, typer.Option(help="A file, or - for standard output.")] = "-",
    format: Annotated[Literal["steps", "messages", "tokens"], typer.Option(help="The face of a trajectory.")] = "steps",
    url: Url = DEFAULT_URL,
    status: State = None,
    tag: Tag = None,
    group: Group = None,
    policy: Policy = None,
    profile: Profile = None,
) -> None:
    """Write trajectories as NDJSON, one a line. A file appears when it is whole."""
    count = 0
    with _errors(), Client(url, client_key()) as client, _written(output) as out:
        for document in client.export(format, **_labels(status, tag, group, policy, profile)):
            out.write(orjson.dumps(document).decode() + "\n")
            count += 1
    typer.echo(f"{count} trajectories", err=True)


def _labels(
    status: Literal["active", "ended"] | None,
    tag: str | None,
    group: str | None,
    policy: str | None,
    profile: str | None,
) -> Labels:
    asked: dict[str, Any] = {"status": status, "tag": tag, "group": group, "policy": policy, "profile": profile}
    return Labels(**{name: value for name, value in asked.items() if value is not None})


@contextmanager
def _written(output: str) -> Generator[TextIO]:
    if output == "-":
        yield sys.stdout
        return
    partial = Path(f"{output}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _errors() -> Generator[None]:
    try:
        yield
    except (EpisodicError, OSError, ValueError, httpx.InvalidURL) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
