"""Options that several commands share, and the settings made from them."""

from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service.settings import Settings, holds_password


def _without_password(url: str | None) -> str | None:
    if url is not None and holds_password(url):
        hint = "everyone on the machine can read a process's arguments: set EPISODIC_STORE, or `store` in a TOML file"
        raise typer.BadParameter(f"the URL holds a password, and {hint}")
    return url


Store = Annotated[str | None, typer.Option(help="SQLAlchemy URL of the store.", callback=_without_password)]


def read_settings(given: dict[str, Any], engine: dict[str, str]) -> Settings:
    named = {name: value for name, value in given.items() if value is not None}
    if engine:
        named["engine"] = engine
    try:
        return Settings(**named)
    except (ValidationError, OSError, ValueError) as error:
        typer.secho(f"settings: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
