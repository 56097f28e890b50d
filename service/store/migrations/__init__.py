"""Alembic's migrations of the SQL store."""

from pathlib import Path

import alembic.command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from service.store.base import StoreRefused
from service.store.schema import metadata


def migrate(connection: Connection, place: str, revision: str = "head") -> None:
    """Brings the schema to a revision, forwards or back, in the caller's transaction. Raises StoreRefused, with the
    store's `place` in its words, for a schema that this version does not know and for rows that stand in the way."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    known = sorted(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())
    if revision not in (*known, "head"):
        raise StoreRefused(f"there is no schema {revision!r}: this version knows {', '.join(known)}")
    found = MigrationContext.configure(connection).get_current_heads()
    _require_ours(connection, place, set(found), set(known))
    config.attributes["connection"] = connection
    goes_back = revision != "head" and max(found, default="") > revision
    try:
        (alembic.command.downgrade if goes_back else alembic.command.upgrade)(config, revision)
    except ValueError as error:  # a row that a migration cannot read, or that would be lost
        raise StoreRefused(f"{place} cannot be brought to schema {revision}: {error}") from error


def _require_ours(connection: Connection, place: str, found: set[str], known: set[str]) -> None:
    if unknown := sorted(found - known):
        raise StoreRefused(
            f"{place} was written by a newer version of Episodic (schema {unknown[0]}, this one knows {max(known)}): "
            "install that version, or serve a backup from before."
        )
    tables = set(inspect(connection).get_table_names())
    if not found and tables and (connection.dialect.name == "sqlite" or tables & set(metadata.tables)):
        raise StoreRefused(f"{place} holds another program's tables ({min(tables)!r}): name another one.")
