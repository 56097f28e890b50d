"""Queries that list episodes: filters, sorting, and keyset pagination by row-value comparison."""

import math
from typing import Any

from sqlalchemy import ColumnElement, Float, RowMapping, Select, cast, false, func, literal, select, tuple_

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


def listing(
    limit: int,
    before: Place | None,
    tenant: str | None,
    where: EpisodeFilter,
    ordering: Ordering = NEWEST_FIRST,
) -> Select[Any]:
    """Returns the query of one page of episodes; see `Store.episodes`."""
    query = select(episodes)
    if ordering.sort == "rating":
        query = select(episodes, _RATING.c.mean).outerjoin(_RATING, _RATING.c.episode_id == episodes.c.episode_id)
    query = query.where(episodes.c.deleted_at.is_(None), *_conditions(tenant, where))
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


def _conditions(tenant: str | None, where: EpisodeFilter) -> list[ColumnElement[bool]]:
    given: dict[str, Any] = {name: value for name, value in where.items() if value is not None}
    metadata = {name: as_text(value) for name, value in given.pop("metadata", {}).items()}
    texts = [tenant or "", *metadata, *(text or "" for text in metadata.values())]
    if not all(map(storable, [*texts, *(value for value in given.values() if isinstance(value, str))])):
        return [false()]  # no stored value is equal to such a text
    conditions = [_condition(name, value) for name, value in given.items()]
    if tenant is not None:
        conditions.append(episodes.c.tenant == tenant)
    for name, text in metadata.items():
        having = select(entries.c.episode_id).where(entries.c.name == name, entries.c.value == text)
        conditions.append(episodes.c.episode_id.in_(having))
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
        case "tag":
            return episodes.c.episode_id.in_(select(tags.c.episode_id).where(tags.c.tag == value))
        case _:
            values: tuple[str, ...] = (value,) if isinstance(value, str) else value
            return LABEL_COLUMNS[name].in_(values)
