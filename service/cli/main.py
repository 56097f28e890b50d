"""The `episodic` command: registers every subcommand."""

import importlib.metadata
from typing import Annotated

import typer

from service.cli.doctor import doctor_command
from service.cli.episodes import episodes_command, export_command
from service.cli.evaluate import evaluate_command
from service.cli.keys import keys_app
from service.cli.learn import learn_command
from service.cli.models import models_app
from service.cli.rollout import rollout_command
from service.cli.serve import serve_command
from service.cli.store import migrate_command, purge_command
from service.cli.train import train_command
from service.settings import Settings


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"episodic {importlib.metadata.version('episodic')}")
        raise typer.Exit


app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """A stateful agent service over vLLM."""


app.command("serve")(serve_command)
app.command("doctor")(doctor_command)
app.command("rollout")(rollout_command)
app.command("episodes")(episodes_command)
app.command("export")(export_command)
app.command("evaluate")(evaluate_command)
app.command("train")(train_command)
app.command("learn")(learn_command)
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")
app.command("migrate")(migrate_command)
app.command("purge")(purge_command)


@app.command("settings")
def settings_command() -> None:
    """Print all settings as a Markdown table."""
    typer.echo(Settings.markdown())
