"""Alembic's migrations of the SQL store."""

from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from service.store.base import StoreRefused
from service.store.schema import metadata


def upgrade(connection: Connection, place: str, revision: str = "head") -> None:
    """Brings the schema up to date, in the caller's transaction. Raises StoreRefused, with the store's `place` in its
    words, for a schema that this version does not know and for rows that it cannot read."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    _require_ours(
        connection, place, {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    )
    config.attributes["connection"] = connection
    try:
        alembic.command.upgrade(config, revision)
    except ValueError as error:  # a row that a migration cannot read
        raise StoreRefused(f"{place} cannot be brought up to date: {error}") from error


def _require_ours(connection: Connection, place: str, known: set[str]) -> None:
    found = set(MigrationContext.configure(connection).get_current_heads())
    if unknown := sorted(found - known):
        raise StoreRefused(
            f"{place} was written by a newer version of Episodic (schema {unknown[0]}, this one knows {max(known)}): "
            "install that version, or serve a backup from before."
        )
    tables = set(inspect(connection).get_table_names())
    if not found and tables and (connection.dialect.name == "sqlite" or tables & set(metadata.tables)):
        raise StoreRefused(f"{place} holds another program's tables ({min(tables)!r}): name another one.")
