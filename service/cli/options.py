"""Options that several commands share, and the function that makes settings from them."""

from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service.settings import Settings, holds_password


def _without_password(url: str | None) -> str | None:
    if url is not None and holds_password(url):
        reason = "the URL contains a password, and every user of the machine can read the arguments of a process"
        raise typer.BadParameter(f"{reason}; set EPISODIC_STORE, or `store` in a TOML file, instead")
    return url


Store = Annotated[
    str | None,
    typer.Option(help="URL of the store, without a password (see EPISODIC_STORE).", callback=_without_password),
]


def read_settings(given: dict[str, Any], engine: dict[str, str]) -> Settings:
    """Makes the settings from a command's options; options that are None were not used.

    Prints what is wrong and exits with code 2 if a setting is invalid.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if engine:
        named["engine"] = engine
    try:
        return Settings(**named)
    except (ValidationError, OSError, ValueError) as error:
        typer.secho(f"settings: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
