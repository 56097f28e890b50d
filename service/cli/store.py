"""The commands `episodic migrate` and `episodic purge`, which change the store directly."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer

from service.agent.policies import SYNC_S
from service.cli.options import Store, fail, read_settings, store_variable
from service.engine.adapters import remove_files
from service.sessions.retention import Purged, purge
from service.settings import Settings
from service.store.base import StoreRefused, StoreUnavailable
from service.store.sql import SQLStore
from service.trajectory import StoredVersion

FORGET_S = 3 * SYNC_S
_MAX_LISTED = 10


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
    only_versions: Annotated[
        bool, typer.Option("--only-versions", help="Only remove versions of adapters; delete no episodes.")
    ] = False,
) -> None:
    """Delete old episodes that have ended, old tombstones, and versions of adapters that nothing uses any more.

    The service may run meanwhile. The files of adapters are deleted from EPISODIC_DATA.
    """
    settings = read_settings({"store": store})
    ended_s = settings.retention_s if retention_s is None else retention_s
    if ended_s is None and not only_versions:
        hint = "use it, set EPISODIC_RETENTION_S, or use --only-versions"
        raise typer.BadParameter(hint, param_hint="--retention-s")
    deleted_s = settings.tombstone_retention_s if tombstone_retention_s is None else tombstone_retention_s
    limits = None if only_versions or ended_s is None else (ended_s, deleted_s)
    try:
        purged, unused = asyncio.run(_purge(settings, limits))
    except (StoreRefused, StoreUnavailable) as error:
        fail(f"{store_variable(settings)}: {error}")
    if purged:
        typer.echo(f"Deleted {purged.num_episodes} episodes and removed {purged.num_tombstones} tombstones.")
    typer.echo(f"Removed {len(unused)} unused versions of adapters{_listed(unused)}.")


def _listed(versions: Sequence[StoredVersion]) -> str:
    names = [version.reference for version in versions[:_MAX_LISTED]]
    more = ", ..." if len(versions) > _MAX_LISTED else ""
    return f": {', '.join(names)}{more}" if names else ""


async def _purge(settings: Settings, limits: tuple[float, float] | None) -> tuple[Purged | None, list[StoredVersion]]:
    """`limits`: when to delete episodes and when to remove tombstones, in seconds; None leaves both alone."""
    async with SQLStore(settings.store_url) as store:
        purged = await purge(store, *limits) if limits else None
        unused = await store.remove_unused_versions([settings.default_policy or ""])
        if unused:
            await asyncio.sleep(FORGET_S)  # replicas forget the versions meanwhile, and read their files no more
        kept = {version.digest for version in (await store.catalog()).versions}
        remove_files(settings.data / "adapters", {version.digest for version in unused} - kept)
        return purged, unused
