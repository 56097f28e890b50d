"""Migrates the schema of the SQL store with Alembic."""

from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from service.store.base import StoreRefused
from service.store.schema import metadata


def migrate(connection: Connection, place: str, revision: str = "head") -> None:
    """Upgrades or downgrades the schema to a revision, in the caller's transaction.

    Raises StoreRefused if the revision or the store's schema is unknown to this version, if the database belongs to
    another program, or if stored rows prevent the migration. `place` describes the store in these messages.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    known = sorted(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())
    if revision not in (*known, "head"):
        raise StoreRefused(f"unknown schema revision {revision!r}: this version knows {', '.join(known)}")
    found = MigrationContext.configure(connection).get_current_heads()
    _require_ours(connection, place, set(found), set(known))
    config.attributes["connection"] = connection
    goes_back = revision != "head" and max(found, default="") > revision
    try:
        (alembic.command.downgrade if goes_back else alembic.command.upgrade)(config, revision)
    except ValueError as error:  # a row that the migration cannot read, or would lose
        raise StoreRefused(f"{place} cannot be migrated to schema {revision}: {error}") from error


def current_revision(connection: Connection) -> str | None:
    """The revision of the schema; None if it has not been migrated."""
    return MigrationContext.configure(connection).get_current_revision()


def _require_ours(connection: Connection, place: str, found: set[str], known: set[str]) -> None:
    if unknown := sorted(found - known):
        raise StoreRefused(
            f"{place} was written by a newer version of Episodic (schema {unknown[0]}; this version knows up to "
            f"{max(known)}). Either install that version, or restore a backup that was made before the upgrade."
        )
    tables = set(inspect(connection).get_table_names())
    if not found and tables and (connection.dialect.name == "sqlite" or tables & set(metadata.tables)):
        raise StoreRefused(
            f"{place} contains another program's tables, such as {min(tables)!r}. Set EPISODIC_STORE to a new database."
        )
