"""The option `--train-args` of `episodic learn`: further options of `episodic train`."""

import shlex
from collections.abc import Sequence

import typer
from typer.main import get_command

from service.cli.train import train_command
from service.learning.options import Method, unused

_OWN = frozenset(
    {"--method", "--from", "--out", "--init-adapter", "--resume", "--no-resume", "--json", "--seed", "--learning-rate"}
)
_HINT = "--train-args"


def parse_train_args(text: str, method: Method) -> tuple[str, ...]:
    """Splits the text into arguments. Raises BadParameter for one that `episodic train` would refuse.

    A wrong argument must be found before the first rollout: a run continues only with the options of its start.
    """
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=_HINT) from error
    options = sorted({option.partition("=")[0] for option in found})
    if own := [option for option in options if option in _OWN]:
        raise typer.BadParameter(f"{', '.join(own)} is set by this command", param_hint=_HINT)
    if "--help" in options:
        raise typer.BadParameter("use `episodic train --help`", param_hint=_HINT)
    if reason := unused(method, options):
        raise typer.BadParameter(reason, param_hint=_HINT)
    _check(["--method", method, "--out", "adapter", *found])
    return found


def _check(arguments: Sequence[str]) -> None:
    """Parses the arguments as `episodic train` does, without training."""
    app = typer.Typer(add_completion=False)
    app.command()(train_command)
    try:
        get_command(app).make_context("episodic train", list(arguments))
    except typer.TyperException as error:
        raise typer.BadParameter(error.format_message(), param_hint=_HINT) from error
