"""The plans of the queries that must stay fast in a large store: pages of a list, and deletion."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import Connection, text

from service.store.sql import SQLStore
from tests.store.statements import Statement, recording
from tests.store.test_stores import commit, fork, record
from tests.support.databases import in_database

NUM_EPISODES = 5_000
RARELY = "CASE WHEN i % 100 = 0 THEN 'rare' ELSE 'common' END"
_SERIES = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :num) SELECT i FROM n",
    "postgresql": "SELECT generate_series(1, :num) AS i",
}


def grow(connection: Connection) -> None:
    """Adds many episodes with one step each, and updates the planner's statistics."""
    numbers = f"({_SERIES[connection.dialect.name]}) AS numbers"
    empty = "x''" if connection.dialect.name == "sqlite" else "CAST('' AS bytea)"
    rows = {
        "episodes": {
            **{"episode_id": "'e' || i", "created_at": "i", "step": "1", "tenant": "'default'"},
            **{"status": "CASE WHEN i % 100 = 0 THEN 'active' ELSE 'ended' END"},
            **{"request": "'{}'", "digest": empty, "policy_version": "'v'", "episode_return": "0", "num_tokens": "0"},
            **{"updated_at": "1", "label_version": "1", "env": RARELY, "episode_group": RARELY, "policy": RARELY},
            **{"profile": RARELY},
        },
        "episode_tags": {"episode_id": "'e' || i", "tag": RARELY},
        "episode_metadata": {"episode_id": "'e' || i", "name": "'k'", "value": RARELY},
        "steps": {
            **{"episode_id": "'e' || i", "step": "0", "message": "'{}'", "closing": "0", "answer": "'{}'"},
            **{"token_ids": empty, "loss_mask": empty, "logprobs": empty, "digest": empty},
            **{"window_start": "1", "created_at": "1"},
        },
    }
    for table, row in rows.items():
        insert = f"INSERT INTO {table} ({', '.join(row)}) SELECT {', '.join(row.values())} FROM {numbers}"  # noqa: S608
        connection.execute(text(insert), {"num": NUM_EPISODES})
    connection.execute(text("ANALYZE"))


@pytest.fixture
async def store(url: str) -> AsyncIterator[SQLStore]:
    async with SQLStore(url) as opened:
        await opened.create(record("root"))
        await opened.commit(commit(0, "root"))
        await opened.fork([fork("child", "root", 1)])
        await in_database(url, grow)
        yield opened


async def plans(url: str, statements: list[Statement]) -> dict[str, str]:
    """Returns the plan of each statement, by its text."""

    def explain(connection: Connection) -> dict[str, str]:
        verb = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
        found: dict[str, str] = {}
        for statement in statements:
            sql, parameters = statement["sql"], tuple(statement["parameters"][0])
            rows: list[Any] = list(connection.exec_driver_sql(f"{verb} {sql}", parameters))
            found[sql] = "\n".join(str(row[-1]) for row in rows)
        return found

    return await in_database(url, explain)


def scans(plan: str, table: str) -> bool:
    """Whether the plan reads the whole table."""
    lines = [line.strip() for line in plan.splitlines()]
    return any(line.startswith((f"SCAN {table}", f"-> Seq Scan on {table}", f"Seq Scan on {table}")) for line in lines)


@pytest.mark.parametrize("tenant", ["default", None])
async def test_a_page_deep_in_the_list_begins_at_its_place_in_the_index(store: SQLStore, url: str, tenant: str | None):
    with recording(store) as statements:
        page = await store.episodes(limit=10, before=(100.0, "e100"), tenant=tenant)
    assert [one.config.episode_id for one in page] == [f"e{number}" for number in range(99, 89, -1)]
    ((sql, plan),) = (await plans(url, statements)).items()
    assert " OR " not in sql
    assert "(created_at,episode_id)<" in plan or ("Index Cond" in plan and "ROW(created_at" in plan), plan
    assert "SORT" not in plan.upper(), plan
    assert not scans(plan, "episodes"), plan


@pytest.mark.parametrize(
    ("where", "index"),
    [
        ({"env": "rare"}, "ix_episodes_tenant_env"),
        ({"group": "rare"}, "ix_episodes_tenant_group"),
        ({"policy": "rare"}, "ix_episodes_tenant_policy"),
        ({"profile": "rare"}, "ix_episodes_tenant_profile"),
        ({"status": "active"}, "ix_episodes_tenant_active"),
        ({"tag": "rare"}, "episode_tags"),
        ({"metadata": {"k": "rare"}}, "episode_metadata"),
    ],
)
async def test_a_page_of_a_rare_label_reads_only_the_episodes_that_have_it(
    store: SQLStore, url: str, where: Any, index: str
):
    with recording(store) as statements:
        page = await store.episodes(limit=10, before=(1000.5, "e"), tenant="default", where=where)
    assert [one.config.episode_id for one in page] == [f"e{number}" for number in range(1000, 0, -100)]
    *_, plan = (await plans(url, statements)).values()
    assert index in plan, plan
    assert not scans(plan, "episodes"), plan


@pytest.mark.parametrize("where", [{"tag": "common"}, {"metadata": {"k": "common"}}])
async def test_a_page_of_a_common_tag_reads_the_list_until_it_is_full(store: SQLStore, url: str, where: Any):
    with recording(store) as statements:
        page = await store.episodes(limit=3, before=(1000.5, "e"), tenant="default", where=where)
    assert [one.config.episode_id for one in page] == ["e999", "e998", "e997"]
    *_, plan = (await plans(url, statements)).values()
    assert "SORT" not in plan.upper(), plan
    assert "B-TREE" not in plan.upper(), plan


async def test_a_deletion_reads_only_the_episode_and_its_family(store: SQLStore, url: str):
    for name in ("e7", "child", "nobody"):
        with recording(store) as statements:
            await store.delete(name)
        assert statements
        for sql, plan in (await plans(url, statements)).items():
            for table in ("episodes", "steps"):  # the other tables are empty here
                assert not scans(plan, table), f"{sql}\n{plan}"


async def test_old_episodes_and_tombstones_are_found_by_an_index(store: SQLStore, url: str):
    with recording(store) as statements:
        await store.delete_ended(5.0, 10)
        await store.remove_tombstones(5.0, 10)
    for sql, plan in (await plans(url, statements)).items():
        assert not scans(plan, "episodes"), f"{sql}\n{plan}"
