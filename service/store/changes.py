"""Writes the changes of a shared commit, new episodes and acts. Each is checked by itself, and one that is refused does
not affect the others.

Every transaction inserts new episodes first, then locks existing ones, each in the order of their ids. Replicas that
write at the same time may therefore wait for each other, but cannot deadlock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, insert, select, update

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
    found = connection.execute(_LOCK, {"ids": [act.step.episode_id for act in acts.values()]})
    active = {row.episode_id: row for row in found if row.status == "active" and row.deleted_at is None}
    next_step: dict[str, int | None] = {name: row.step for name, row in active.items()}
    rows: list[_Row] = []
    states: list[_Row] = []
    for number, act in acts.items():
        try:
            if next_step.get(act.step.episode_id) != act.step.index:
                raise StepTaken
            if act.opened_at not in (None, active[act.step.episode_id].created_at):
                raise StepTaken
            rows.append(step_row(act.step))
            states.append({"id": act.step.episode_id, **state_row(act.state)})
            next_step[act.step.episode_id] = act.state.step if act.state.status == "active" else None
        except (StepTaken, TypeError, ValueError) as error:
            refusals[number] = error
    if rows:
        connection.execute(_ADVANCE, states)
        connection.execute(_INSERT_STEPS, rows)
