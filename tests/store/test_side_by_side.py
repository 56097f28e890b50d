"""Replicas of this version and of the previous one share an expanded schema: each reads and continues what the other
wrote. The statements of the previous version are a recording, made with its code."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import delete, select

from service.store.base import StoreRefused
from service.store.schema import entries, episodes, versions
from service.store.sql import SQLStore
from service.trajectory import StoredVersion
from tests.store.statements import SCENARIO, Statement, load, run
from tests.support.databases import in_database

PREVIOUS = "0004"
BEFORE_VERSIONS = "0008"
OLD, NEW = "old", "new"
NAMES = [name for name, _ in SCENARIO]


def statements(url: str) -> dict[str, list[Statement]]:
    return load(PREVIOUS, "sqlite" if url.startswith("sqlite") else "postgresql")


async def run_old(url: str, operation: list[Statement]) -> None:
    """Runs an operation of the previous version in a transaction. What it reads must be what it read when recorded."""

    def execute(connection: Any) -> None:
        for statement in operation:
            rows = run(statement)(connection)
            assert "rows" not in statement or rows == statement["rows"], statement["sql"]

    await in_database(url, execute)


@pytest.fixture
async def store(url: str) -> AsyncIterator[SQLStore]:
    async with SQLStore(url) as opened:
        yield opened


MIXES = {
    "all old": lambda number: OLD,
    "old and new in turn": lambda number: (OLD, NEW)[number % 2],
    "new and old in turn": lambda number: (NEW, OLD)[number % 2],
    "opened by new, read by old": lambda number: NEW if number < NAMES.index("read an episode") else OLD,
}


@pytest.mark.parametrize("mix", MIXES)
async def test_operations_of_both_versions_have_the_results_of_one(store: SQLStore, url: str, mix: str):
    recorded = statements(url)
    assert recorded.keys() == set(NAMES)
    for number, (name, operation) in enumerate(SCENARIO):
        if MIXES[mix](number) == OLD:
            await run_old(url, recorded[name])
        else:
            await operation(store)
    for name in NAMES[NAMES.index("read an episode") :]:
        await run_old(url, recorded[name])
    trajectories = {name: await store.trajectory(name) for name in ("a", "f", "ff", "h", "acme:a")}
    shapes = {name: found and (found[0].state.step, len(found[1])) for name, found in trajectories.items()}
    assert shapes == {"a": (2, 3), "f": (2, 2), "ff": (2, 2), "h": (1, 1), "acme:a": (0, 0)}
    for where in ({"env": "lake"}, {"metadata": {"env": "lake"}}):
        found = await store.episodes(limit=9, before=None, tenant="default", where=where)  # type: ignore[arg-type]
        assert {one.config.episode_id for one in found} == {"a", "f"}, where
    (rated,) = [one for one in await store.feedback("a") if one.rater == "ann"]
    assert rated.rating == 5


async def test_an_alias_of_the_previous_version_gets_its_version_and_its_history(store: SQLStore, url: str):
    await run_old(url, statements(url)["load an adapter"])
    loaded = StoredVersion("p", "d", "v", 8, 1.0)
    catalog = await store.catalog()
    assert (catalog.versions, catalog.aliases, catalog.previous) == ((loaded,), {"p": "d"}, {})
    newer = StoredVersion("p", "e", "w", 8, 2.0)
    await store.put_version(newer, move_alias=True)
    catalog = await store.catalog()
    assert (catalog.versions, catalog.previous) == ((loaded, newer), {"p": "d"})
    await run_old(url, statements(url)["load an adapter"])
    assert (await store.catalog()).previous == {"p": "e"}, "an older replica moved the alias back"
    assert await store.roll_back("p") == newer
    await run_old(url, statements(url)["load an adapter"])
    assert await store.delete_alias("p")
    assert (await store.catalog()).versions == (loaded, newer)


async def test_a_downgrade_is_refused_if_a_version_or_its_lineage_would_be_lost(url: str):
    for lost in ({"parent": "p@" + "0" * 12}, {"round": 0}, {"evaluation": "{}"}):
        async with SQLStore(url) as store:
            await store.put_version(StoredVersion("p", "d", "v", 8, 1.0, **lost), move_alias=True)
        with pytest.raises(StoreRefused, match="p@d or its lineage would be lost"):
            await SQLStore(url).migrate(BEFORE_VERSIONS)
        await in_database(url, lambda connection: connection.execute(delete(versions)))
    async with SQLStore(url) as store:
        await store.put_version(StoredVersion("p", "d", "v", 8, 1.0), move_alias=True)
    await SQLStore(url).migrate(BEFORE_VERSIONS)
    async with SQLStore(url) as store:
        assert (await store.catalog()).aliases == {"p": "d"}
        await store.put_version(StoredVersion("p", "e", "v", 8, 1.0), move_alias=False)
    with pytest.raises(StoreRefused, match="p@e"):
        await SQLStore(url).migrate(BEFORE_VERSIONS)


async def test_a_tombstone_of_the_previous_version_keeps_no_labels(store: SQLStore, url: str):
    await dict(SCENARIO)["open one to delete"](store)
    await run_old(url, statements(url)["delete"])
    await store._labelling.catch_up()
    (tombstone,) = await in_database(url, lambda connection: connection.execute(select(episodes)).mappings().all())
    assert tombstone["deleted_at"] is not None
    assert "lake" not in str(tombstone)
    assert await in_database(url, lambda connection: connection.execute(select(entries)).all()) == []


async def test_episodes_of_the_previous_version_get_their_labels_once(store: SQLStore, url: str):
    await run_old(url, statements(url)["open"])
    for _ in range(2):
        (found,) = await store.episodes(limit=9, before=None, where={"env": "lake", "metadata": {"seed": 7}})
        assert found.config.episode_id == "a"
    rows = await in_database(url, lambda connection: connection.execute(select(entries).order_by("name")).all())
    assert [tuple(row) for row in rows] == [("env", "lake", "a"), ("seed", "7", "a")]
    (seed,) = await in_database(url, lambda connection: connection.execute(select(episodes.c.seed)).one())
    assert seed == "7"
