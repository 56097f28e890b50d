"""Statements on policies: the versions of adapters, the aliases that point to them, and the default policy.

An older replica writes aliases only. Therefore an alias may point to a version without a row of its own, and the
alias's history may lack that version. `_remember` adds both before a change that needs them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Table, delete, insert, select, update

from service.store.base import KEPT_MOVES
from service.store.schema import alias_row, aliases, checked, defaults, episodes, moves, version_row, versions
from service.trajectory import Catalog, StoredVersion

_LINEAGE = ("parent", "round", "evaluation")


def put_version(connection: Connection, version: StoredVersion, moved_at: float | None) -> StoredVersion:
    """See `Store.put_version`. `moved_at`: the time at which the alias moves; None if it does not."""
    row = version_row(version)
    known = _version(connection, version.name, version.digest)
    if known is None:
        connection.execute(insert(versions), row)
        stored = version
    else:
        given = {name: row[name] for name in _LINEAGE if row[name] is not None}
        stored = replace(known, **given)
        if given:
            connection.execute(update(versions).where(*_is(version.name, version.digest)).values(given))
    if moved_at is not None:
        _move(connection, stored, moved_at)
    return stored


def roll_back(connection: Connection, name: str) -> StoredVersion | None:
    """See `Store.roll_back`."""
    current = _locked_alias(connection, name)
    if current is None:
        return None
    _remember(connection, current)
    last = select(moves).where(moves.c.name == name).order_by(moves.c.move_id.desc()).limit(2)
    entries = connection.execute(last).all()
    earlier = _version(connection, name, entries[1].digest) if len(entries) > 1 else None
    if earlier is not None:
        connection.execute(delete(moves).where(moves.c.move_id == entries[0].move_id))
        _point_again(connection, earlier)
    return earlier


def delete_alias(connection: Connection, name: str) -> bool:
    """See `Store.delete_alias`."""
    current = _locked_alias(connection, name)
    if current is None:
        return False
    _remember(connection, current)
    connection.execute(delete(moves).where(moves.c.name == name))
    connection.execute(delete(aliases).where(aliases.c.name == name))
    return True


def set_default(connection: Connection, policy: str | None) -> None:
    """See `Store.set_default_policy`."""
    connection.execute(delete(defaults))
    if policy is not None:
        connection.execute(insert(defaults), checked(defaults, {"key": 1, "policy": policy}))


def read_catalog(connection: Connection) -> Catalog:
    """See `Store.catalog`."""
    pointed = connection.execute(select(aliases)).mappings().all()
    found = {(row["name"], row["digest"]): StoredVersion(**row) for row in pointed}
    found |= {
        (row["name"], row["digest"]): StoredVersion(**row) for row in connection.execute(select(versions)).mappings()
    }
    current = {row["name"]: row["digest"] for row in pointed}
    history: dict[str, list[str]] = {}
    for row in connection.execute(select(moves.c.name, moves.c.digest).order_by(moves.c.move_id)):
        history.setdefault(row.name, []).append(row.digest)
    return Catalog(
        versions=tuple(sorted(found.values(), key=lambda one: (one.name, one.loaded_at, one.digest))),
        aliases=current,
        previous={name: before for name, at in current.items() if (before := _before(history.get(name, []), at))},
        default=connection.execute(select(defaults.c.policy)).scalar(),
    )


def read_marks(connection: Connection) -> object:
    """See `Store.catalog_marks`."""
    rows = [sorted(tuple(row) for row in connection.execute(_references(table))) for table in (aliases, versions)]
    return rows, connection.execute(select(defaults.c.policy)).scalar()


def remove_unused(connection: Connection, keep: Sequence[str]) -> list[StoredVersion]:
    """See `Store.remove_unused_versions`."""
    of_episodes = select(episodes.c.policy_digest, episodes.c.policy_version).where(episodes.c.status == "active")
    used: set[str] = set()
    for digest, version in connection.execute(of_episodes.distinct()):
        used.add(version if digest is None else digest)
    pointed = {(row.name, row.digest) for table in (aliases, moves) for row in connection.execute(_references(table))}
    named = [*keep, *connection.execute(select(defaults.c.policy)).scalars()]
    unused = [
        version
        for version in (StoredVersion(**row) for row in connection.execute(select(versions)).mappings())
        if (version.name, version.digest) not in pointed
        and not used & {version.digest, version.version}
        and not any(version.has_reference(name) for name in named)
    ]
    for version in unused:
        connection.execute(delete(versions).where(*_is(version.name, version.digest)))
    return unused


def _references(table: Table) -> "Select[Any, Any]":
    return select(table.c.name, table.c.digest)


def _before(history: list[str], current: str) -> str | None:
    """Returns the version to roll back to. The current one may be missing in the history."""
    earlier = history[:-1] if history[-1:] == [current] else history
    return earlier[-1] if earlier else None


def _move(connection: Connection, version: StoredVersion, moved_at: float) -> None:
    """Lets the alias point to the version."""
    current = _locked_alias(connection, version.name)
    if current is None:
        connection.execute(insert(aliases), alias_row(version))
    else:
        _remember(connection, current)
        if current.digest == version.digest:
            return
        _point_again(connection, version)
    _append(connection, version, moved_at)


def _point_again(connection: Connection, version: StoredVersion) -> None:
    connection.execute(update(aliases).where(aliases.c.name == version.name).values(alias_row(version)))


def _append(connection: Connection, version: StoredVersion, moved_at: float) -> None:
    """Adds an entry to the history, and removes the oldest one beyond `KEPT_MOVES`."""
    connection.execute(insert(moves), {"name": version.name, "digest": version.digest, "moved_at": moved_at})
    newest = select(moves.c.move_id).where(moves.c.name == version.name).order_by(moves.c.move_id.desc())
    if beyond := connection.execute(newest.offset(KEPT_MOVES)).scalars().all():
        connection.execute(delete(moves).where(moves.c.move_id.in_(beyond)))


def _remember(connection: Connection, current: StoredVersion) -> None:
    """Adds the alias's version and the last entry of its history, if an older replica wrote the alias without them."""
    if _version(connection, current.name, current.digest) is None:
        connection.execute(insert(versions), version_row(current))
    last = select(moves.c.digest).where(moves.c.name == current.name).order_by(moves.c.move_id.desc()).limit(1)
    if connection.execute(last).scalar() != current.digest:
        _append(connection, current, current.loaded_at)


def _locked_alias(connection: Connection, name: str) -> StoredVersion | None:
    """Returns the version that the alias points to, and locks the alias until the transaction ends."""
    row = connection.execute(select(aliases).where(aliases.c.name == name).with_for_update()).mappings().first()
    return None if row is None else StoredVersion(**row)


def _version(connection: Connection, name: str, digest: str) -> StoredVersion | None:
    row = connection.execute(select(versions).where(*_is(name, digest))).mappings().first()
    return None if row is None else StoredVersion(**row)


def _is(name: str, digest: str) -> tuple[ColumnElement[bool], ...]:
    return versions.c.name == name, versions.c.digest == digest
