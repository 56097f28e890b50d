"""The commands `episodic migrate` and `episodic purge`, which change the store directly."""

import asyncio
from typing import Annotated

import typer

from service.cli.options import Store, fail, read_settings, store_variable
from service.sessions.retention import Purged, purge
from service.store.base import StoreRefused, StoreUnavailable
from service.store.sql import SQLStore


def migrate_command(
    store: Store = None,
    to: Annotated[
        str, typer.Option(help="Schema revision to migrate to. Downgrade with it before you run an older version.")
    ] = "head",
) -> None:
    """Migrate the store to the latest schema. `episodic serve` does this too when it starts."""
    settings = read_settings({"store": store})
    try:
        asyncio.run(SQLStore(settings.store_url).migrate(to))
    except (StoreRefused, StoreUnavailable) as error:
        fail(f"{store_variable(settings)}: {error}")
    typer.echo("The store's schema is up to date." if to == "head" else f"The store's schema is now revision {to}.")


def purge_command(
    store: Store = None,
    retention_s: Annotated[
        float | None,
        typer.Option(min=0, help="Delete episodes that ended more than this many seconds ago (EPISODIC_RETENTION_S)."),
    ] = None,
    tombstone_retention_s: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Remove tombstones of episodes deleted more than this many seconds ago "
            "(EPISODIC_TOMBSTONE_RETENTION_S).",
        ),
    ] = None,
) -> None:
    """Delete old episodes that have ended, and remove old tombstones. The service may run meanwhile."""
    settings = read_settings({"store": store})
    ended_s = settings.retention_s if retention_s is None else retention_s
    if ended_s is None:
        raise typer.BadParameter("use it, or set EPISODIC_RETENTION_S", param_hint="--retention-s")
    deleted_s = settings.tombstone_retention_s if tombstone_retention_s is None else tombstone_retention_s
    try:
        purged = asyncio.run(_purge(settings.store_url, ended_s, deleted_s))
    except (StoreRefused, StoreUnavailable) as error:
        fail(f"{store_variable(settings)}: {error}")
    typer.echo(f"Deleted {purged.num_episodes} episodes and removed {purged.num_tombstones} tombstones.")


async def _purge(url: str, retention_s: float, tombstone_s: float) -> Purged:
    async with SQLStore(url) as store:
        return await purge(store, retention_s, tombstone_s)
