"""Options that several commands share, the function that makes settings from them, and how a command fails."""

import math
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from service.cli.setting_errors import faults
from service.client import ApiError
from service.settings import Settings, holds_password


def _without_password(url: str | None) -> str | None:
    if url is not None and holds_password(url):
        reason = "the URL contains a password, and every user of the machine can read the arguments of a process"
        raise typer.BadParameter(f"{reason}; set EPISODIC_STORE, or `store` in a TOML file, instead")
    return url


Store = Annotated[
    str | None,
    typer.Option(
        help="URL of the store, without a password (EPISODIC_STORE).",
        callback=_without_password,
        rich_help_panel="Storage",
    ),
]


def finite(value: float | None) -> float | None:
    """Refuses infinity and NaN, as the callback of an option."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


def read_settings(given: dict[str, Any], engine: dict[str, str] | None = None) -> Settings:
    """Makes the settings from a command's options; options that are None were not used.

    If a setting is invalid, prints a line for each fault and exits with code 2.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if engine:
        named["engine"] = engine
    try:
        return Settings(**named)
    except (OSError, ValueError) as error:
        fail(*faults(error))


def store_variable(settings: Settings) -> str:
    """The variable that says where the store is."""
    return "EPISODIC_STORE" if settings.store else "EPISODIC_DATA"


def program() -> str:
    """The name with which the user can call this program again: a path, unless the shell finds it by itself."""
    called = Path(sys.argv[0])
    if called.name != "episodic" or shutil.which("episodic") == str(called.absolute()):
        return "episodic"
    return sys.argv[0]


def no_service(url: str, reason: object) -> str:
    """The error if no service answers at a URL."""
    hint = f"start one with `{program()} serve`, or set --url or EPISODIC_URL"
    return f"no service answers at {url} ({reason}): {hint}"


def explained(error: Exception) -> str:
    """The error of a call, with what the user of a command can do about a missing key."""
    is_refused = isinstance(error, ApiError) and error.status == 401
    return f"{error} The commands read the key from EPISODIC_API_KEY." if is_refused else str(error)


def fail(*lines: str, code: int = 2) -> NoReturn:
    """Prints each line as an error, and ends the command."""
    for line in lines:
        typer.secho(f"Error: {line}", fg="red", err=True)
    raise typer.Exit(code)
