"""Writes the changes of a shared commit, new episodes and acts. Each is checked by itself, and one that is refused does
not affect the others.

Every transaction inserts new episodes first, then locks existing ones, each in the order of their ids. Replicas that
write at the same time may therefore wait for each other, but cannot deadlock.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, insert, select, update

from service.store.base import Change, Commit, EpisodeExists, StepTaken
from service.store.schema import episode_row, episodes, state_row, step_row, steps, tag_rows, tags
from service.trajectory import EpisodeState, StoredEpisode

_Row = dict[str, Any]

_ADVANCE = (
    update(episodes)
    .where(episodes.c.episode_id == bindparam("id"))
    .values({name: bindparam(name) for name in state_row(EpisodeState())})
)


def locked(which: ColumnElement[bool]) -> "Select[Any, Any, Any, Any]":
    """Selects episodes and locks their rows until the transaction ends (SELECT ... FOR UPDATE).

    SQLAlchemy omits the clause for SQLite, which has only one writer at a time.
    """
    columns = (episodes.c.episode_id, episodes.c.step, episodes.c.status, episodes.c.deleted_at)
    return select(*columns).where(which).order_by(episodes.c.episode_id).with_for_update()


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


def insert_episodes(connection: Connection, rows: Sequence[tuple[_Row, list[_Row]]]) -> None:
    """Inserts episodes. `rows` has for each the row of the episode and the rows of its tags."""
    if rows:
        ordered = sorted(rows, key=lambda row: row[0]["episode_id"])
        connection.execute(insert(episodes), [row for row, _ in ordered])
        if tagged := [tag for _, tag_rows in ordered for tag in tag_rows]:
            connection.execute(insert(tags), tagged)


def _open(connection: Connection, records: dict[int, StoredEpisode], refusals: dict[int, Exception]) -> None:
    if not records:
        return
    ids = {record.config.episode_id for record in records.values()}
    taken = set(connection.execute(select(episodes.c.episode_id).where(episodes.c.episode_id.in_(ids))).scalars())
    rows: list[tuple[_Row, list[_Row]]] = []
    for number, record in records.items():
        try:
            if record.config.episode_id in taken:
                raise EpisodeExists
            rows.append((episode_row(record), tag_rows(record)))
            taken.add(record.config.episode_id)
        except (EpisodeExists, TypeError, ValueError) as error:
            refusals[number] = error
    insert_episodes(connection, rows)


def _advance(connection: Connection, acts: dict[int, Commit], refusals: dict[int, Exception]) -> None:
    if not acts:
        return
    found = connection.execute(_LOCK, {"ids": [act.step.episode_id for act in acts.values()]})
    next_step: dict[str, int | None]
    next_step = {row.episode_id: row.step for row in found if row.status == "active" and row.deleted_at is None}
    rows: list[_Row] = []
    states: list[_Row] = []
    for number, act in acts.items():
        try:
            if next_step.get(act.step.episode_id) != act.step.index:
                raise StepTaken
            rows.append(step_row(act.step))
            states.append({"id": act.step.episode_id, **state_row(act.state)})
            next_step[act.step.episode_id] = act.state.step if act.state.status == "active" else None
        except (StepTaken, TypeError, ValueError) as error:
            refusals[number] = error
    if rows:
        connection.execute(_ADVANCE, states)
        connection.execute(_INSERT_STEPS, rows)
