"""What the SQL store adds: durability, migrations, shared commits, and a plain word when the database fails."""

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import alembic.command
import alembic.config
import orjson
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, insert, make_url

from service.store.base import EVERY, Filter, StepTaken, StoreUnavailable
from service.store.group_commit import MAX_BATCH
from service.store.schema import ancestors, metadata, step_row, steps
from service.store.sql import _MIGRATIONS, SQLStore
from service.trajectory import EpisodeRecord, StopReason
from tests.store.test_stores import commit, record, step


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/episodic.db"


async def test_migrations_make_exactly_the_tables_of_the_schema(tmp_path: Path):
    store = SQLStore(url(tmp_path))
    await store.open()
    await store.close()
    engine = create_engine(f"sqlite:///{tmp_path}/episodic.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def older(folder: Path, request: str) -> None:
    """A store of the first schema, with one episode in it."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = make_url(url(folder))
    alembic.command.upgrade(config, "0001")
    values = "'old', ?, X'00', 'v', 1.0, 0, 'active', NULL, NULL, 0, 0, 1, NULL, NULL"
    execute(folder, f"INSERT INTO episodes VALUES ({values})", request)  # noqa: S608


def execute(folder: Path, statement: str, *values: str) -> None:
    connection = sqlite3.connect(folder / "episodic.db")
    connection.execute(statement, values)
    connection.commit()
    connection.close()


async def test_an_older_store_is_brought_up_to_date_with_its_labels(tmp_path: Path):
    older(tmp_path, '{"policy": "p", "group": "g", "tags": ["x", "x", "y"]}')
    store = SQLStore(url(tmp_path))
    await store.open()
    for where in (Filter(tag="x"), Filter(tag="y"), Filter(group="g"), Filter(policy="p")):
        assert [row.config.episode_id for row in await store.episodes(limit=9, before=None, where=where)] == ["old"]
    await store.commit(commit(0, "old"))
    assert await store.steps("old") == [step(0, "old")]
    await store.close()


async def test_a_migration_that_is_broken_off_leaves_the_store_as_it_was(tmp_path: Path):
    older(tmp_path, "no JSON")
    with pytest.raises(orjson.JSONDecodeError):
        await SQLStore(url(tmp_path)).open()
    execute(tmp_path, "UPDATE episodes SET request = '{}'")
    store = SQLStore(url(tmp_path))
    await store.open()
    assert await store.num_active() == 1
    await store.close()


async def test_a_lineage_may_be_deep(tmp_path: Path):
    """Deeper than SQLite lets an expression be."""
    store = SQLStore(url(tmp_path))
    await store.open()
    depth = 1_100
    await store.create(replace(record("leaf"), head=replace(record().head, step=depth)))
    with store._engine.begin() as connection:
        rows = [{"episode_id": "leaf", "ancestor_id": f"a{n}", "num_steps": n + 1} for n in range(depth)]
        connection.execute(insert(ancestors), rows)
        connection.execute(insert(steps), [step_row(step(n, f"a{n}")) for n in range(depth)])
    await store.commit(commit(depth, "leaf"))
    assert [row.index for row in await store.steps("leaf")] == list(range(depth + 1))
    assert await store.steps("leaf", 700) == [step(700, "a700")]
    await store.close()


async def test_what_was_committed_is_there_after_opening_anew(tmp_path: Path):
    store = SQLStore(url(tmp_path / "made" / "on the way"))
    await store.open()
    await store.create(record())
    await store.commit(commit(0))
    await store.commit(commit(1, ends=StopReason.TERMINATED))
    await store.close()
    again = SQLStore(url(tmp_path / "made" / "on the way"))
    await again.open()
    assert [row.index for row in await again.steps("e")] == [0, 1]
    found = await again.episode("e")
    assert found is not None
    assert found.head == commit(1, ends=StopReason.TERMINATED).head
    await again.close()


async def test_a_commit_is_on_disk_when_it_returns(tmp_path: Path):
    """Another process sees it at once; and the journal is synced, so that a power cut does not take it back."""
    store = SQLStore(url(tmp_path))
    await store.open()
    await store.create(record())
    await store.commit(commit(0))
    with sqlite3.connect(tmp_path / "episodic.db") as other:
        assert other.execute("SELECT count(*) FROM steps").fetchone() == (1,)
    other.close()
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    await store.close()


async def test_concurrent_changes_share_commits(tmp_path: Path):
    batches: list[int] = []
    store = SQLStore(url(tmp_path), lambda num_changes, _: batches.append(num_changes))
    await store.open()
    names = [f"e{number}" for number in range(600)]
    await asyncio.gather(*(store.create(record(name)) for name in names))
    await asyncio.gather(*(store.commit(commit(0, name)) for name in names))
    assert sum(batches) == 1200
    assert max(batches) <= MAX_BATCH
    assert len(batches) <= 12
    assert len(await store.episodes(limit=1000, before=None, where=EVERY)) == 600
    await store.close()


async def test_closing_writes_what_is_on_its_way(tmp_path: Path):
    store = SQLStore(url(tmp_path))
    await store.open()
    await store.create(record())
    late = asyncio.create_task(store.commit(commit(0)))
    await asyncio.sleep(0)
    await store.close()
    await late
    with pytest.raises(StoreUnavailable):
        await store.commit(commit(1))
    again = SQLStore(url(tmp_path))
    await again.open()
    assert len(await again.steps("e")) == 1
    await again.close()


async def test_a_caller_that_leaves_does_not_tear_a_commit(tmp_path: Path):
    store = SQLStore(url(tmp_path))
    await store.open()
    await asyncio.gather(*(store.create(record(f"e{number}")) for number in range(10)))
    tasks = [asyncio.create_task(store.commit(commit(0, f"e{number}"))) for number in range(10)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()
    again = SQLStore(url(tmp_path))
    await again.open()
    assert [len(await again.steps(f"e{number}")) for number in range(10)] == [1] * 10
    await again.close()


async def test_two_stores_race_on_one_file(tmp_path: Path):
    """Two processes of one host: of two commits of a step one wins, and none is lost."""
    one, two = SQLStore(url(tmp_path)), SQLStore(url(tmp_path))
    await one.open()
    await two.open()
    await one.create(record())
    won = {one: 0, two: 0}
    for index in range(20):
        results = await asyncio.gather(one.commit(commit(index)), two.commit(commit(index)), return_exceptions=True)
        assert sorted(map(type, results), key=str) == sorted([type(None), StepTaken], key=str)
        won[(one, two)[results.index(None)]] += 1
    assert len(await two.steps("e")) == sum(won.values()) == 20
    await one.close()
    await two.close()


async def test_a_failing_database_is_store_unavailable_and_heals(tmp_path: Path):
    store = SQLStore(url(tmp_path))
    await store.open()
    await store.create(record())
    other = sqlite3.connect(tmp_path / "episodic.db", isolation_level=None)
    other.execute("ALTER TABLE steps RENAME TO hidden")
    for call in (store.commit(commit(0)), store.steps("e"), store.delete("e")):
        with pytest.raises(StoreUnavailable) as failure:
            await call
        assert "INSERT" not in str(failure.value)
    other.execute("ALTER TABLE hidden RENAME TO steps")
    other.close()
    await store.commit(commit(0))
    found = await store.episode("e")
    assert found is not None
    assert found.head.step == 1, "the failed commit left nothing behind"
    await store.close()


@pytest.mark.parametrize("what", ["a folder", "no database"])
async def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path, what: str):
    path = tmp_path / "episodic.db"
    if what == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreUnavailable, match="cannot open the store"):
        await SQLStore(url(tmp_path)).open()


async def test_a_deleted_parents_rows_that_no_fork_reads_are_gone(tmp_path: Path):
    store = SQLStore(url(tmp_path))
    await store.open()
    await store.create(record())
    for index in range(5):
        await store.commit(commit(index))
    for name, at_step in (("f", 1), ("g", 3)):
        fork = record(name)
        await store.fork([EpisodeRecord(replace(fork.config, parent=("e", at_step)), replace(fork.head, step=at_step))])
    for gone, num_rows in (("e", 3), ("g", 1), ("f", 0)):
        await store.delete(gone)
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM steps").scalar() == num_rows
    await store.close()


async def test_a_step_that_cannot_be_written_spoils_no_other(tmp_path: Path):
    store = SQLStore(url(tmp_path))
    await store.open()
    names = [f"e{number}" for number in range(8)]
    await asyncio.gather(*(store.create(record(name)) for name in names))
    commits = [commit(0, name) for name in names]
    unwritable = replace(commits[3].step, answer={"action": 10**30})
    commits[3] = replace(commits[3], step=unwritable)
    results = await asyncio.gather(*map(store.commit, commits), return_exceptions=True)
    assert [type(result) for result in results] == [type(None)] * 3 + [TypeError] + [type(None)] * 4
    await store.close()
