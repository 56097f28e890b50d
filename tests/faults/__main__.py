"""`python -m tests.faults`: injects faults into the real service. Exit code 1 if the checker found an error."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tests.e2e.server import Server
from tests.faults.campaign import Plan, Verdict, run
from tests.faults.stand import SETTINGS, FaultKind, Stand
from tests.support.postgres import missing, running

_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
_STORES = ("sqlite", "postgresql")


def main(
    rounds: Annotated[
        int, typer.Option(help="Rounds for each kind of fault and each store, with one fault each.")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 7,
    store: Annotated[str, typer.Option(help="The store: sqlite, postgresql or both.")] = "both",
    kinds: Annotated[
        str, typer.Option(help="Kinds of faults, separated by commas: server,engine,postgres,replicas.")
    ] = ",".join(_KINDS),
    episodes: Annotated[int, typer.Option(help="Concurrent episodes.")] = 64,
    first: Annotated[int, typer.Option(help="Number of the first round, to repeat a certain round.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder to keep data and logs in.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Injects faults into the real service under load.

    Checks that every acknowledged act is stored exactly once and unchanged. Exit code 1 if one is not.
    """
    console, verdicts = Console(width=None if sys.stdout.isatty() else 120), []
    stores = _STORES if store == "both" else _chosen(store, _STORES)
    if "postgresql" in stores and (reason := missing()):
        console.print(f"PostgreSQL cannot be started: {reason}. To run without it, use --store sqlite.")
        raise typer.Exit(2)
    for kind, one in _campaigns(_chosen(kinds, _KINDS), stores):
        plan = Plan(kind, one, seed, rounds, episodes, first)
        with _stand(kind, one, keep and keep / f"{kind}-{one}") as stand:
            verdicts.append(run(stand, plan, console.print))
    _report(verdicts, console)
    if json_path is not None:
        json_path.write_text(json.dumps([verdict.document() for verdict in verdicts], indent=1) + "\n")
    console.print(f"To repeat this: python -m tests.faults --seed {seed} --kinds {kinds} --store {store}", end=" ")
    console.print(f"--rounds {rounds} --first {first} --episodes {episodes}")
    console.print("To repeat round N only, and keep its data and logs: --rounds 1 --first N --keep FOLDER")
    raise typer.Exit(int(any(verdict.findings for verdict in verdicts)))


def _chosen(names: str, known: "tuple[str, ...]") -> list[str]:
    chosen = names.split(",")
    if unknown := set(chosen) - set(known):
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return chosen


def _campaigns(kinds: list[str], stores: "list[str] | tuple[str, ...]") -> Iterator[tuple[FaultKind, str]]:
    """Yields each kind of fault with each store that it applies to: some kinds require PostgreSQL."""
    for kind in _KINDS:
        on = [one for one in stores if one == "postgresql" or kind in ("server", "engine")]
        yield from ((kind, one) for one in on if kind in kinds)


@contextmanager
def _stand(kind: FaultKind, store: str, keep: Path | None) -> Iterator[Stand]:
    """Starts the servers and their database. Their data is deleted at the end, unless `keep` names a folder for it."""
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        folder.mkdir(parents=True, exist_ok=True)
        database = stack.enter_context(running()) if store == "postgresql" else None
        settings = {**SETTINGS, "store": database.create("faults")} if database else SETTINGS
        num_servers = 2 if kind == "replicas" else 1
        stand = Stand([Server(folder / f"server-{number}", **settings) for number in range(num_servers)], database)
        stack.callback(stand.kill)
        yield stand.start()


def _report(verdicts: list[Verdict], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("kind", "store"):
        table.add_column(heading)
    for heading in ("rounds", "acts", "faults", "retried", "replayed", "losses", "doubles", "others"):
        table.add_column(heading, justify="right")
    for one in verdicts:
        figures = (one.num_rounds, one.num_acts, one.num_faults, one.num_retried, one.num_replayed)
        bad = (one.num_losses, one.num_doubles, one.num_others)
        table.add_row(one.plan.kind, one.plan.store, *map(str, (*figures, *bad)))
    console.print(table)
    for finding in [finding for one in verdicts for finding in one.findings][:50]:
        console.print(str(finding), style="red", markup=False)
    num_acts, num_bad = sum(one.num_acts for one in verdicts), sum(len(one.findings) for one in verdicts)
    verdict = "nothing was lost, duplicated or changed" if not num_bad else f"{num_bad} findings"
    console.print(f"{num_acts} acts acknowledged, {sum(one.num_faults for one in verdicts)} faults: {verdict}.")


if __name__ == "__main__":
    typer.run(main)
