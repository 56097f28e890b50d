"""Owns what one shared commit writes: new episodes and acts, each checked by itself, so that one refused spoils none.

Rows are inserted, then locked, in the order of their ids, here and wherever a transaction takes several: so replicas
that write at once wait for each other in turn and never in a circle.
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
    """The episodes' ids, steps and whether they go on; nobody else changes these rows until the transaction ends.
    (SQLite has one writer and no such clause.)"""
    columns = (episodes.c.episode_id, episodes.c.step, episodes.c.status, episodes.c.deleted_at)
    return select(*columns).where(which).order_by(episodes.c.episode_id).with_for_update()


# Built once: that takes longer than a short commit's statements do.
_LOCK = locked(episodes.c.episode_id.in_(bindparam("ids", expanding=True)))
_INSERT_STEPS = insert(steps)


def write_changes(connection: Connection, changes: Sequence[Change]) -> list[Exception | None]:
    """Of each change what it is refused for: EpisodeExists, StepTaken, or the TypeError or ValueError of a value that
    cannot be stored. The others are written. Raises IntegrityError when another replica opens one of the episodes."""
    refusals: dict[int, Exception] = {}
    _open(connection, {n: change for n, change in enumerate(changes) if isinstance(change, StoredEpisode)}, refusals)
    _advance(connection, {n: change for n, change in enumerate(changes) if isinstance(change, Commit)}, refusals)
    return [refusals.get(n) for n in range(len(changes))]


def insert_episodes(connection: Connection, rows: Sequence[tuple[_Row, list[_Row]]]) -> None:
    """Each an episode's row and its tags'."""
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
    steps_there: dict[str, int | None]
    steps_there = {row.episode_id: row.step for row in found if row.status == "active" and row.deleted_at is None}
    rows: list[_Row] = []
    states: list[_Row] = []
    for number, act in acts.items():
        try:
            if steps_there.get(act.step.episode_id) != act.step.index:
                raise StepTaken
            rows.append(step_row(act.step))
            states.append({"id": act.step.episode_id, **state_row(act.state)})
            steps_there[act.step.episode_id] = act.state.step if act.state.status == "active" else None
        except (StepTaken, TypeError, ValueError) as error:
            refusals[number] = error
    if rows:
        connection.execute(_ADVANCE, states)
        connection.execute(_INSERT_STEPS, rows)
