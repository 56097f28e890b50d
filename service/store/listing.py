"""Queries that list episodes: filters, sorting, and keyset pagination by row-value comparison."""

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    RowMapping,
    Select,
    cast,
    exists,
    false,
    func,
    literal,
    select,
    tuple_,
)

from service.filters import EpisodeFilter, as_text, unix_seconds
from service.store.base import NEWEST_FIRST, Ordering, Place
from service.store.schema import LABEL_COLUMNS, entries, episode_record, episodes, ratings, storable, tags
from service.trajectory import StoredEpisode

_RATING = (
    select(ratings.c.episode_id, func.avg(cast(ratings.c.rating, Float)).label("mean"))
    .group_by(ratings.c.episode_id)
    .subquery("rated")
)
"""The mean rating of each rated episode."""
_MAX_RARE = 1_000
"""Up to this number of episodes have a tag or a metadata entry that counts as rare."""


def listing(
    limit: int,
    before: Place | None,
    tenant: str | None,
    where: EpisodeFilter,
    ordering: Ordering = NEWEST_FIRST,
    rare: int | None = None,
    columns: Sequence[Any] = (episodes,),
) -> "Select[*tuple[Any, ...]]":
    """Returns the query of one page of episodes; see `Store.episodes`.

    rare: the result of `rare_selection`.
    columns: what the query returns of each episode.
    """
    query: Select[*tuple[Any, ...]] = select(*columns)
    if ordering.sort == "rating":
        query = select(episodes, _RATING.c.mean).outerjoin(_RATING, _RATING.c.episode_id == episodes.c.episode_id)
    query = query.where(episodes.c.deleted_at.is_(None), *_conditions(tenant, where, rare))
    keys = _keys(ordering)
    if before is not None:
        query = query.where(_after(keys, before, ordering))
    return query.order_by(*(key.desc() if ordering.order == "desc" else key.asc() for key in keys)).limit(limit)


def listed(row: RowMapping, ordering: Ordering) -> StoredEpisode:
    """Converts a row of the listing."""
    return episode_record(row, row["mean"] if ordering.sort == "rating" else None)


def _keys(ordering: Ordering) -> list[ColumnElement[Any]]:
    """Returns the columns that the list is sorted by. Together they are unique and never null."""
    created: list[ColumnElement[Any]] = [episodes.c.created_at, episodes.c.episode_id]
    match ordering.sort:
        case "created":
            return created
        case "return":
            return [episodes.c.episode_return, *created]
        case "length":
            return [cast(episodes.c.step, Float(53)), *created]
        case "rating":
            return [func.coalesce(_RATING.c.mean, ordering.unrated), *created]


def _after(keys: list[ColumnElement[Any]], place: Place, ordering: Ordering) -> ColumnElement[bool]:
    """Returns the condition of keyset pagination: episodes that sort after this place.

    A comparison of whole rows can use an index from this place on. A chain of OR and AND cannot, and reads all rows
    before it.
    """
    if len(place) != len(keys) or any(math.isnan(number) for number in place[:-1]) or not storable(place[-1]):
        return false()
    row = tuple_(*keys)
    values = tuple_(*(literal(value, key.type) for value, key in zip(place, keys, strict=True)))
    return row < values if ordering.order == "desc" else row > values


def rare_selection(connection: Connection, where: EpisodeFilter) -> int | None:
    """Returns which tag or metadata entry of the filter few episodes have, as an index; None if there is none.

    The query then starts with these episodes. Otherwise it reads the list from its place on, until the page is full.
    PostgreSQL chooses between the two itself, from its statistics. SQLite has none.
    """
    if connection.dialect.name != "sqlite":
        return None
    for index, chosen in enumerate(_selections(where)):
        num_found = select(func.count()).select_from(chosen.limit(_MAX_RARE + 1).subquery())
        if connection.execute(num_found).scalar_one() <= _MAX_RARE:
            return index
    return None


def is_storable(tenant: str | None, where: EpisodeFilter) -> bool:
    """Returns whether every text of the filter can be stored. If not, no episode matches, and a query may fail."""
    metadata = {name: as_text(value) or "" for name, value in where.get("metadata", {}).items()}
    given = [value for value in where.values() if isinstance(value, str)]
    return all(map(storable, [tenant or "", *metadata, *metadata.values(), *given]))


def _selections(where: EpisodeFilter) -> list[Select[Any]]:
    """Returns the ids of the episodes that have the tag of the filter, and of those that have each metadata entry."""
    tag, metadata = where.get("tag"), where.get("metadata", {})
    chosen = [] if tag is None else [select(tags.c.episode_id).where(tags.c.tag == tag)]
    for name, value in metadata.items():
        chosen.append(select(entries.c.episode_id).where(entries.c.name == name, entries.c.value == as_text(value)))
    return chosen


def _conditions(tenant: str | None, where: EpisodeFilter, rare: int | None) -> list[ColumnElement[bool]]:
    conditions = [
        _condition(name, value)
        for name, value in where.items()
        if value is not None and name not in ("tag", "metadata")
    ]
    if tenant is not None:
        # An expression instead of the column keeps the query from using the tenant's index.
        owner = episodes.c.tenant if rare is None else episodes.c.tenant.concat("")
        conditions.append(owner == tenant)
    for index, chosen in enumerate(_selections(where)):
        (column,) = chosen.selected_columns
        is_same = exists(chosen.where(column == episodes.c.episode_id))
        conditions.append(episodes.c.episode_id.in_(chosen) if index == rare else is_same)
    return conditions


def _condition(name: str, value: Any) -> ColumnElement[bool]:
    match name:
        case "status":
            return episodes.c.status == value
        case "success":
            return episodes.c.success == int(value)
        case "since":
            return episodes.c.created_at >= unix_seconds(value)
        case "until":
            return episodes.c.created_at < unix_seconds(value)
        case _:
            column = LABEL_COLUMNS[name]
            return column == value if isinstance(value, str) else column.in_(value)
