"""Owns `episodic keys`: API keys are made, listed and revoked on the store itself, whether the service runs or not."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from service.access.keys import SCOPES, TENANT, Scope, new_key
from service.settings import Settings
from service.store.base import Store, StoreRefused, StoreUnavailable
from service.store.sql import SQLStore
from service.trajectory import DEFAULT_TENANT

T = TypeVar("T")
_NOTHING: dict[str, Any] = {}

keys_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys in the store (EPISODIC_STORE).")


@keys_app.command()
def create(
    tenant: Annotated[
        str, typer.Option(help="Whose key it is: a tenant sees its own episodes alone.")
    ] = DEFAULT_TENANT,
    scopes: Annotated[str, typer.Option(help="Of act, read, admin; commas between them.")] = "act,read",
) -> None:
    """Make a key and print it: it is shown this once, the store keeps its digest."""
    key, record = new_key(_tenant(tenant), _scopes(scopes), time.time())
    _on_store(lambda store: store.add_key(record))
    typer.echo(f"{record.key_id} for {record.tenant}: {','.join(record.scopes)}", err=True)
    typer.echo(key)


@keys_app.command()
def new() -> None:
    """Print a key that no store knows, for a file of secrets: the service makes it known (EPISODIC_ADMIN_KEY)."""
    key, _ = new_key(DEFAULT_TENANT, SCOPES, time.time())
    typer.echo(key)


@keys_app.command("list")
def list_keys() -> None:
    """List the keys by their public ids."""
    table = Table("key", "tenant", "scopes", "made", "revoked", box=None)
    for record in _on_store(lambda store: store.keys()):
        revoked = "" if record.revoked_at is None else _shown(record.revoked_at)
        table.add_row(record.key_id, record.tenant, ",".join(record.scopes), _shown(record.created_at), revoked)
    Console().print(table)


@keys_app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="The key's public id.")]) -> None:
    """Revoke a key: within a second the service refuses it."""
    if not _on_store(lambda store: store.revoke_key(key_id, time.time())):
        _fail(f"there is no valid key {key_id!r}")


def _on_store(work: Callable[[Store], Awaitable[T]]) -> T:
    async def run() -> T:
        async with SQLStore(Settings(**_NOTHING).store_url) as store:
            return await work(store)

    try:
        return asyncio.run(run())
    except (StoreRefused, StoreUnavailable, OSError, ValueError) as error:
        _fail(str(error))


def _tenant(name: str) -> str:
    if not re.fullmatch(TENANT, name):
        raise typer.BadParameter(f"{name!r} must have 1 to 64 of a-z, 0-9, _ and -", param_hint="--tenant")
    return name


def _scopes(listed: str) -> list[Scope]:
    asked = listed.split(",")
    if unknown := set(asked) - set(SCOPES):
        raise typer.BadParameter(f"there is no scope {min(unknown)!r}", param_hint="--scopes")
    return [scope for scope in SCOPES if scope in asked]


def _shown(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"


def _fail(why: str) -> NoReturn:
    typer.secho(f"keys: {why}", fg="red", err=True)
    raise typer.Exit(1)
