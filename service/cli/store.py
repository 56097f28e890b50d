"""The command `episodic migrate`: migrates the schema of the store."""

import asyncio
from typing import Annotated

import typer

from service.cli.options import Store, fail, read_settings, store_variable
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
