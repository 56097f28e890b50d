"""Writes the changes of a shared commit, new episodes and acts. Each is checked by itself, and one that is refused does
not affect the others.

Every transaction inserts new episodes first, then locks existing ones, each in the order of their ids. Replicas that
write at the same time may therefore wait for each other, but cannot deadlock.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Connection, Insert, Select, Update, bindparam, insert, select, update
from sqlalchemy.dialects import sqlite

from service.store.base import Change, Commit, EpisodeExists, StepTaken
from service.store.schema import entries, entry_rows, episode_row, episodes, state_row, step_row, steps, tag_rows, tags
from service.trajectory import EpisodeState, StoredEpisode

_Row = dict[str, Any]

_ADVANCE = (
    update(episodes)
    .where(episodes.c.episode_id == bindparam("id"))
    .values({name: bindparam(name) for name in state_row(EpisodeState())})
)


def locked(which: ColumnElement[bool]) -> "Select[Any, Any, Any, Any, Any]":
    """Selects episodes and locks their rows until the transaction ends (SELECT ... FOR UPDATE).

    SQLAlchemy omits the clause for SQLite, which has only one writer at a time.
    """
    row = episodes.c
    return (
        select(row.episode_id, row.step, row.status, row.deleted_at, row.created_at)
        .where(which)
        .order_by(episodes.c.episode_id)
        .with_for_update()
    )


# Built once, because building them takes longer than executing the statements of a short commit.
_LOCK = locked(episodes.c.episode_id.in_(bindparam("ids", expanding=True)))
_INSERT_STEPS = insert(steps)

_HEADS = (
    "SELECT episode_id, step, status, deleted_at, created_at FROM episodes "
    "WHERE episode_id IN (SELECT value FROM json_each(?))"
)
"""`_LOCK` for SQLite, which has only one writer at a time and needs no lock."""


@cache
def _sql(statement: Insert | Update) -> str:
    """Returns a statement in SQLite's dialect, with named parameters."""
    names = [column.name for column in steps.c] if isinstance(statement, Insert) else None
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="named"), column_keys=names))


def _heads(connection: Connection, episode_ids: Sequence[str]) -> Iterable[Any]:
    """Selects the heads of these episodes, and locks them until the transaction ends."""
    if driver := _driver(connection):
        return driver.execute(_HEADS, [orjson.dumps(episode_ids).decode()])
    return connection.execute(_LOCK, {"ids": episode_ids})


def _write(connection: Connection, statement: Insert | Update, rows: Sequence[_Row]) -> None:
    if driver := _driver(connection):
        driver.executemany(_sql(statement), rows)
    else:
        connection.execute(statement, rows)


def _driver(connection: Connection) -> sqlite3.Connection | None:
    """Returns the connection of SQLite's driver; None for PostgreSQL.

    A commit of a single act takes twice as much CPU time with SQLAlchemy as with the driver itself.
    """
    return connection.connection.driver_connection if connection.dialect.name == "sqlite" else None


def write_changes(connection: Connection, changes: Sequence[Change]) -> list[Exception | None]:
    """Writes the changes that are valid. Returns one item for each change: None, or why it was refused.

    The reasons are EpisodeExists, StepTaken, and the TypeError or ValueError of a value that cannot be stored. Raises
    IntegrityError if another replica creates one of the episodes at the same time.
    """
    refusals: dict[int, Exception] = {}
    _open(connection, {n: change for n, change in enumerate(changes) if isinstance(change, StoredEpisode)}, refusals)
    _advance(connection, {n: change for n, change in enumerate(changes) if isinstance(change, Commit)}, refusals)
    return [refusals.get(n) for n in range(len(changes))]


@dataclass(frozen=True, slots=True)
class EpisodeRows:
    """The rows of one new episode."""

    episode: _Row
    tags: list[_Row]
    entries: list[_Row]


def rows_of(record: StoredEpisode) -> EpisodeRows:
    """Returns the rows of a new episode. Raises ValueError or TypeError for a value that cannot be stored."""
    config = record.config
    return EpisodeRows(episode_row(record), tag_rows(record), entry_rows(config.episode_id, config.request))


def insert_episodes(connection: Connection, new: Sequence[EpisodeRows]) -> None:
    """Inserts episodes, with their tags and metadata."""
    if new:
        ordered = sorted(new, key=lambda rows: rows.episode["episode_id"])
        connection.execute(insert(episodes), [rows.episode for rows in ordered])
        if tagged := [row for rows in ordered for row in rows.tags]:
            connection.execute(insert(tags), tagged)
        if with_metadata := [row for rows in ordered for row in rows.entries]:
            connection.execute(insert(entries), with_metadata)


def _open(connection: Connection, records: dict[int, StoredEpisode], refusals: dict[int, Exception]) -> None:
    if not records:
        return
    ids = {record.config.episode_id for record in records.values()}
    taken = set(connection.execute(select(episodes.c.episode_id).where(episodes.c.episode_id.in_(ids))).scalars())
    rows: list[EpisodeRows] = []
    for number, record in records.items():
        try:
            if record.config.episode_id in taken:
                raise EpisodeExists
            rows.append(rows_of(record))
            taken.add(record.config.episode_id)
        except (EpisodeExists, TypeError, ValueError) as error:
            refusals[number] = error
    insert_episodes(connection, rows)


def _advance(connection: Connection, acts: dict[int, Commit], refusals: dict[int, Exception]) -> None:
    if not acts:
        return
    found = _heads(connection, [act.step.episode_id for act in acts.values()])
    next_step: dict[str, int | None] = {}
    opened_at: dict[str, float] = {}
    for episode_id, step, status, deleted_at, created_at in found:
        if status == "active" and deleted_at is None:
            next_step[episode_id], opened_at[episode_id] = step, created_at
    rows: list[_Row] = []
    states: list[_Row] = []
    for number, act in acts.items():
        try:
            if next_step.get(act.step.episode_id) != act.step.index:
                raise StepTaken
            if act.opened_at not in (None, opened_at[act.step.episode_id]):
                raise StepTaken
            rows.append(step_row(act.step))
            states.append({"id": act.step.episode_id, **state_row(act.state)})
            next_step[act.step.episode_id] = act.state.step if act.state.status == "active" else None
        except (StepTaken, TypeError, ValueError) as error:
            refusals[number] = error
    if rows:
        _write(connection, _ADVANCE, states)
        _write(connection, _INSERT_STEPS, rows)
