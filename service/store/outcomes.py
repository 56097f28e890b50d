"""Queries of an evaluation: pages of a few columns of many episodes, with their tags and ratings, and sampled steps."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Subquery, bindparam, null, select

from service.filters import By, EpisodeFilter
from service.store.base import OLDEST_FIRST, Outcome, OutcomePage, Place, StepSample
from service.store.listing import listing, rare_selection
from service.store.schema import LABEL_COLUMNS, ancestors, episodes, ratings, steps, tags

_STEPS = (
    select(steps.c.episode_id, steps.c.seconds, steps.c.temperature)
    .where(
        steps.c.episode_id.in_(bindparam("ids", expanding=True)),
        steps.c.step < bindparam("num_steps"),
        steps.c.closing == 0,
    )
    .order_by(steps.c.episode_id, steps.c.step)
)


def outcome_page(
    connection: Connection, limit: int, after: Place | None, tenant: str, where: EpisodeFilter, by: By
) -> OutcomePage:
    """Reads a page of outcomes; see `Store.outcomes`.

    The tags, ratings and ancestors are those of the same page: a list of its ids would be slow to send and to parse.
    """
    rare = rare_selection(connection, where)

    def page(*columns: ColumnElement[Any]) -> "Select[*tuple[Any, ...]]":
        return listing(limit, after, tenant, where, OLDEST_FIRST, rare, columns)

    ids = page(episodes.c.episode_id).subquery("page")
    rows = connection.execute(page(*_columns(by))).all()
    has_orphans = any(row.parent_id is not None and row.seed is None for row in rows)
    roots: Mapping[str, str] = _roots(connection, ids) if has_orphans else {}
    return OutcomePage(
        [Outcome._make((*row, roots.get(row[0], row[0]))) for row in rows],
        _tags(connection, ids) if by == "tag" else {},
        _ratings(connection, ids),
    )


def step_samples(connection: Connection, episode_ids: Sequence[str], num_steps: int) -> list[StepSample]:
    """Reads the first steps of some episodes; see `Store.step_samples`."""
    rows = connection.execute(_STEPS, {"ids": episode_ids, "num_steps": num_steps})
    return [StepSample._make(row) for row in rows]


def _columns(by: By) -> list[ColumnElement[Any]]:
    """Returns the columns of an outcome, in the order of its fields. The root is not a column."""
    names = [name for name in Outcome._fields if name != "root"]
    return [_value_column(by).label(name) if name == "value" else episodes.c[name] for name in names]


def _value_column(by: By) -> ColumnElement[Any]:
    match by:
        case "tag":
            return null()
        case "policy_version":
            return episodes.c.policy_version
        case _:
            return LABEL_COLUMNS[by]


def _roots(connection: Connection, ids: Subquery) -> Mapping[str, str]:
    """Returns the oldest ancestor of each fork, which is the one with the fewest steps."""
    query = select(ancestors.c.episode_id, ancestors.c.ancestor_id)
    query = query.join(ids, ids.c.episode_id == ancestors.c.episode_id).order_by(ancestors.c.num_steps.desc())
    return {row.episode_id: row.ancestor_id for row in connection.execute(query)}  # the last one counts


def _tags(connection: Connection, ids: Subquery) -> Mapping[str, Sequence[str]]:
    query = select(tags.c.episode_id, tags.c.tag).join(ids, ids.c.episode_id == tags.c.episode_id).order_by(tags.c.tag)
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.episode_id].append(row.tag)
    return found


def _ratings(connection: Connection, ids: Subquery) -> Mapping[str, Sequence[tuple[str | None, int]]]:
    query = select(ratings.c.episode_id, ratings.c.rater, ratings.c.rating).where(ratings.c.step.is_(None))
    query = query.join(ids, ids.c.episode_id == ratings.c.episode_id).order_by(ratings.c.feedback_id)
    found: defaultdict[str, list[tuple[str | None, int]]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.episode_id].append((row.rater, row.rating))
    return found
