"""The command `episodic keys`: creates, lists and revokes API keys.

It works directly on the store, so the service need not run.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from service.access.keys import SCOPES, TENANT, Scope, new_key
from service.cli.options import fail, read_settings, store_variable
from service.store.base import Store, StoreRefused, StoreUnavailable
from service.store.sql import SQLStore
from service.trajectory import DEFAULT_TENANT

T = TypeVar("T")

keys_app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys in the store (EPISODIC_STORE).")


@keys_app.command()
def create(
    tenant: Annotated[
        str, typer.Option(help="Tenant of the key. A tenant sees only its own episodes.")
    ] = DEFAULT_TENANT,
    scopes: Annotated[str, typer.Option(help="Comma-separated scopes: act, read, admin.")] = "act,read",
) -> None:
    """Create a key and print it. It cannot be printed again: the store keeps only its digest."""
    key, record = new_key(_tenant(tenant), _scopes(scopes), time.time())
    _on_store(lambda store: store.add_key(record))
    typer.echo(f"{record.key_id} for {record.tenant}: {','.join(record.scopes)}", err=True)
    typer.echo(key)


@keys_app.command()
def new() -> None:
    """Print a new key without storing it, for EPISODIC_ADMIN_KEY: the service adds it to the store when it starts."""
    key, _ = new_key(DEFAULT_TENANT, SCOPES, time.time())
    typer.echo(key)


@keys_app.command("list")
def list_keys() -> None:
    """List the keys by their public ids. Times are in UTC."""
    table = Table("key", "tenant", "scopes", "created", "revoked", box=None)
    for record in _on_store(lambda store: store.keys()):
        revoked = "" if record.revoked_at is None else _format_time(record.revoked_at)
        table.add_row(record.key_id, record.tenant, ",".join(record.scopes), _format_time(record.created_at), revoked)
    if table.row_count:
        Console().print(table)
    else:
        typer.echo("no keys", err=True)


@keys_app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="Public id of the key, from `episodic keys list`.")]) -> None:
    """Revoke a key. A running service refuses it within a second."""
    if not _on_store(lambda store: store.revoke_key(key_id, time.time())):
        fail(f"key {key_id!r} does not exist or is already revoked; see `episodic keys list`", code=1)


def _on_store(work: Callable[[Store], Awaitable[T]]) -> T:
    settings = read_settings({})

    async def run() -> T:
        async with SQLStore(settings.store_url) as store:
            return await work(store)

    try:
        return asyncio.run(run())
    except (StoreRefused, StoreUnavailable) as error:
        fail(f"{store_variable(settings)}: {error}")


def _tenant(name: str) -> str:
    if not re.fullmatch(TENANT, name):
        expected = "use 1 to 64 of the characters a-z, 0-9, _ and -"
        raise typer.BadParameter(f"{name!r} is not a valid tenant name: {expected}", param_hint="--tenant")
    return name


def _scopes(listed: str) -> list[Scope]:
    requested = listed.split(",")
    if unknown := set(requested) - set(SCOPES):
        hint = f"unknown scope {min(unknown)!r}; the scopes are {', '.join(SCOPES)}"
        raise typer.BadParameter(hint, param_hint="--scopes")
    return [scope for scope in SCOPES if scope in requested]


def _format_time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"
