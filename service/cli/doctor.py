"""The command `episodic doctor`: checks the machine and the settings, and says what to do, in a line for each."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.checks import CHECKS, Result, run
from service.cli.setting_errors import faults
from service.settings import Settings

_COLORS = {"ok": "green", "warning": "yellow", "wrong": "red"}


def doctor_command(
    config: Annotated[Path | None, typer.Option(help="Path of a TOML file with settings (EPISODIC_CONFIG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON array.")] = False,
) -> None:
    """Check the machine and the settings that `episodic serve` would use. The exit code is 1 if something is wrong."""
    results = _results({"config": config} if config else {})
    if as_json:
        typer.echo(json.dumps([result.as_json() for result in results]))
    for result in () if as_json else results:
        typer.echo(f"{typer.style(f'{result.status:9}', fg=_COLORS[result.status])}{result.check:10}{result.detail}")
    if any(result.status == "wrong" for result in results):
        raise typer.Exit(1)


def _results(given: dict[str, Any]) -> list[Result]:
    try:
        settings = Settings(**given)
    except (OSError, ValueError) as error:
        return [Result("settings", "wrong", line) for line in faults(error)]
    return [run(name, check, settings) for name, check in CHECKS.items()]
