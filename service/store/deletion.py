"""Deletes episodes: leaves a tombstone, keeps the steps that forks still read, and removes old tombstones."""

from collections.abc import Collection, Iterable

from sqlalchemy import Connection, delete, exists, func, select, update

from service.store.changes import locked
from service.store.schema import LABEL_COLUMNS, ancestors, entries, episodes, ratings, steps, tags

_MAX_STEPS = 5_000
"""Number of steps after which a batch of old episodes is full. It bounds the duration of the transaction."""

_BLANK = {column.name: None for column in (*LABEL_COLUMNS.values(), episodes.c.label_version, episodes.c.expires_at)}


def delete_episodes(connection: Connection, episode_ids: Collection[str], now: float) -> list[str]:
    """Replaces the episodes with tombstones. Returns the ids of those that existed and were not deleted before.

    The lineage is read before the lock: it is written once, together with the episode.
    """
    family = {*episode_ids, *_lineage(connection, episode_ids)}
    found = {row.episode_id: row for row in connection.execute(locked(episodes.c.episode_id.in_(family)))}
    doomed = [name for name in episode_ids if name in found and found[name].deleted_at is None]
    if not doomed:
        return []
    family = {*doomed, *_lineage(connection, doomed)}
    values = {"deleted_at": now, "request": "{}", "status": "ended", **_BLANK}
    connection.execute(update(episodes).where(episodes.c.episode_id.in_(doomed)).values(values))
    for table in (ancestors, tags, entries, ratings):
        connection.execute(delete(table).where(table.c.episode_id.in_(doomed)))
    for member in sorted(family):
        _drop_unread_steps(connection, member)
    return doomed


def delete_ended(connection: Connection, ended_before: float, limit: int, now: float) -> list[str]:
    """Deletes at most `limit` episodes that ended before this time, the oldest first. Returns their ids.

    Fewer are deleted at once if they have many steps.
    """
    query = select(episodes.c.episode_id, episodes.c.step)
    query = query.where(episodes.c.deleted_at.is_(None), episodes.c.ended_at < ended_before)
    chosen: list[str] = []
    num_steps = 0
    for row in connection.execute(query.order_by(episodes.c.ended_at).limit(limit)):
        num_steps += row.step
        if chosen and num_steps > _MAX_STEPS:
            break
        chosen.append(row.episode_id)
    return delete_episodes(connection, chosen, now) if chosen else []


def remove_tombstones(connection: Connection, deleted_before: float, limit: int) -> int:
    """Removes at most `limit` tombstones of episodes that were deleted before this time. Returns their number.

    The tombstone of an ancestor stays: as long as a fork reads its steps, no other episode may get its id.
    """
    is_ancestor = exists(select(ancestors.c.episode_id).where(ancestors.c.ancestor_id == episodes.c.episode_id))
    query = select(episodes.c.episode_id).where(episodes.c.deleted_at < deleted_before, ~is_ancestor)
    query = query.order_by(episodes.c.deleted_at).limit(limit).with_for_update(skip_locked=True)
    names = list(connection.execute(query).scalars())
    if names:
        for table in (episodes, entries):
            connection.execute(delete(table).where(table.c.episode_id.in_(names)))
    return len(names)


def _lineage(connection: Connection, episode_ids: Iterable[str]) -> list[str]:
    """Returns the ids of the episodes' ancestors."""
    query = select(ancestors.c.ancestor_id).where(ancestors.c.episode_id.in_(episode_ids)).distinct()
    return list(connection.execute(query).scalars())


def _drop_unread_steps(connection: Connection, episode_id: str) -> None:
    """If the episode is deleted, deletes those of its steps that no fork shares."""
    gone = select(episodes.c.episode_id).where(episodes.c.episode_id == episode_id, episodes.c.deleted_at.is_not(None))
    num_read = select(func.max(ancestors.c.num_steps)).where(ancestors.c.ancestor_id == episode_id).scalar_subquery()
    unread = steps.c.step >= func.coalesce(num_read, 0)
    connection.execute(delete(steps).where(steps.c.episode_id == episode_id, exists(gone), unread))
