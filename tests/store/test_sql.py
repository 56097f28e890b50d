"""What only the SQL stores have, SQLite and PostgreSQL: durability, migrations, shared commits, concurrent replicas."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, String, delete, func, insert, select, text, update

from service.store.base import EVERY, EpisodeExists, EpisodeGone, StepTaken, StoreRefused, StoreUnavailable
from service.store.group_commit import MAX_BATCH
from service.store.migrations import migrate
from service.store.schema import ancestors, episodes, metadata, ratings, step_row, steps
from service.store.sql import SQLStore
from service.trajectory import Feedback, Message, StopReason, StoredEpisode
from tests.store.test_stores import commit, fork, record, step
from tests.support.databases import in_database

_T = TypeVar("_T")


@pytest.fixture
async def store(url: str) -> AsyncIterator[SQLStore]:
    async with SQLStore(url) as opened:
        yield opened


@pytest.fixture
async def other(store: SQLStore, url: str) -> AsyncIterator[SQLStore]:
    """The store of a second replica, on the same database."""
    opened = SQLStore(url)
    await opened.open()
    yield opened
    await opened.close()


async def num_rows(url: str) -> int:
    return await in_database(url, lambda connection: connection.scalar(select(func.count()).select_from(steps)) or 0)


VERSION = "SELECT version_num FROM alembic_version"


async def test_migrations_make_exactly_the_tables_of_the_schema(store: SQLStore, url: str):
    def compare(connection: Connection) -> Any:
        options = {"compare_type": _differ, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    assert await in_database(url, compare) == []


def _differ(context: MigrationContext, _column: Any, _meta: Any, found: Any, wanted: Any) -> bool | None:
    """Ignores the lengths of texts on SQLite, which does not enforce them; the migrations do not change them there."""
    on_sqlite = context.dialect.name == "sqlite"
    return False if on_sqlite and isinstance(found, String) and isinstance(wanted, String) else None


def older(revision: str, request: str) -> Callable[[Connection], None]:
    """Returns a function that makes a store with an earlier schema and one episode."""

    def make(connection: Connection) -> None:
        migrate(connection, "the store", revision)
        names = "episode_id, request, digest, policy_version, created_at, step, status, episode_return, num_tokens"
        values = "'old', :request, :digest, 'v', 1.0, 0, 'active', 0, 0, 1"
        statement = f"INSERT INTO episodes ({names}, updated_at) VALUES ({values})"  # noqa: S608
        connection.execute(text(statement), {"request": request, "digest": b"0" * 16})

    return make


async def test_an_older_store_is_brought_up_to_date_with_its_labels(url: str):
    await in_database(url, older("0001", '{"policy": "p", "group": "g", "tags": ["x", "x", "y"]}'))
    store = SQLStore(url)
    await store.open()
    filters: list[Any] = [{"tag": "x"}, {"tag": "y"}, {"group": "g"}, {"policy": "p"}, {}]
    for where in filters:
        found = await store.episodes(limit=9, before=None, tenant="default", where=where)
        assert [row.config.episode_id for row in found] == ["old"]
    await store.commit(commit(0, "old"))
    assert await store.steps("old") == [step(0, "old")]
    await store.close()


async def test_a_store_of_before_tenants_is_the_default_tenants(url: str):
    await in_database(url, older("0002", '{"policy": "p"}'))
    store = SQLStore(url)
    await store.open()
    assert await store.num_active("default") == 1
    long_id = "t" * 64 + ":" + "e" * 128
    await store.create(record(long_id))
    await store.commit(commit(0, long_id))
    assert [row.episode_id for row in await store.steps(long_id)] == [long_id]
    await store.close()


async def test_failed_migration_changes_nothing(url: str):
    await in_database(url, older("0001", "no JSON"))
    with pytest.raises(StoreRefused):
        await SQLStore(url).open()
    await in_database(url, lambda connection: connection.execute(text("UPDATE episodes SET request = '{}'")))
    store = SQLStore(url)
    await store.open()
    assert await store.num_active() == 1
    await store.close()


async def test_replicas_that_start_together_migrate_once(url: str):
    replicas = [SQLStore(url) for _ in range(3)]
    await asyncio.gather(*(replica.open() for replica in replicas))
    await replicas[0].create(record())
    assert [await replica.num_active() for replica in replicas] == [1, 1, 1]
    for replica in replicas:
        await replica.close()


async def test_store_of_a_newer_version_is_refused(store: SQLStore, url: str):
    await in_database(url, lambda connection: connection.execute(text("UPDATE alembic_version SET version_num='9999'")))
    with pytest.raises(StoreRefused, match=r"newer version of Episodic \(schema 9999.*install that version"):
        await SQLStore(url).open()


@pytest.mark.parametrize("revision", ["0001", "0002"])
async def test_downgrade_and_upgrade_lose_nothing(url: str, revision: str):
    async with SQLStore(url) as store:
        await store.create(record())
        await store.commit(commit(0))
    await SQLStore(url).migrate(revision)
    assert await in_database(url, lambda connection: connection.execute(text(VERSION)).scalar()) == revision
    async with SQLStore(url) as store:
        assert await store.trajectory("e") == (replace(record(), state=commit(0).state), [step(0)])


async def test_a_downgrade_is_not_refused_for_tombstones_of_other_tenants(url: str):
    async with SQLStore(url) as store:
        await store.create(record())
        await store.create(record("acme:" + "e" * 128))
        await store.delete("acme:" + "e" * 128)
    await SQLStore(url).migrate("0002")
    async with SQLStore(url) as store:
        assert await store.num_active() == 1


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("0003", "the episode 'two-streams'"),
        ("0002", "the tenant 'acme'"),
        ("0001", "the fork 'fork'"),
        ("0006", "the steps of the episode .supported."),
        ("0010", "this version knows 0001, 0002, 0003, 0004, 0005, 0006, 0007, 0008, 0009"),
    ],
)
async def test_lossy_downgrade_is_refused(url: str, revision: str, message: str):
    async with SQLStore(url) as store:
        await store.create(record())
        await store.commit(commit(0))
        if revision == "0006":
            await store.create(record("supported"))
            span = replace(step(0).span, support=array("i", [1, 0, 2, -1]))
            await store.commit(commit(0, "supported", span=span))
        if revision == "0003":
            await store.create(record("two-streams"))
            span = replace(step(0).span, encoder_token_ids=array("i", [1, 2]))
            await store.commit(commit(0, "two-streams", span=span))
        if revision == "0002":
            await store.create(record("acme:e"))
        fork = record("fork")
        await store.fork([replace(fork, config=replace(fork.config, parent=("e", 1)), state=commit(0).state)])
    with pytest.raises(StoreRefused, match=message):
        await SQLStore(url).migrate(revision)
    assert await in_database(url, lambda connection: connection.execute(text(VERSION)).scalar()) == "0009"
    async with SQLStore(url) as store:
        assert await store.steps("fork") == [step(0)]


async def test_another_programs_tables_are_left_alone(url: str):
    await in_database(url, lambda connection: connection.execute(text("CREATE TABLE episodes (title TEXT)")))
    with pytest.raises(StoreRefused, match="another program's tables"):
        await SQLStore(url).open()
    assert await in_database(url, lambda connection: connection.execute(text("SELECT title FROM episodes")).all()) == []


async def test_many_generations_of_forks(store: SQLStore, url: str):
    """More ancestors than the 1,000 levels that SQLite allows in an expression."""
    depth = 1_100
    await store.create(replace(record("leaf"), state=replace(record().state, step=depth)))

    def grow(connection: Connection) -> None:
        rows = [{"episode_id": "leaf", "ancestor_id": f"a{n}", "num_steps": n + 1} for n in range(depth)]
        connection.execute(insert(ancestors), rows)
        connection.execute(insert(steps), [step_row(step(n, f"a{n}")) for n in range(depth)])

    await in_database(url, grow)
    await store.commit(commit(depth, "leaf"))
    assert [row.index for row in await store.steps("leaf")] == list(range(depth + 1))
    assert await store.steps("leaf", 700) == [step(700, "a700")]
    assert await store.delete("leaf")


async def test_commits_persist_after_reopening(url: str):
    store = SQLStore(url)
    await store.open()
    await store.create(record())
    await store.commit(commit(0))
    await store.commit(commit(1, ends=StopReason.TERMINATED))
    await store.close()
    again = SQLStore(url)
    await again.open()
    assert [row.index for row in await again.steps("e")] == [0, 1]
    found = await again.episode("e")
    assert found is not None
    assert found.state == commit(1, ends=StopReason.TERMINATED).state
    await again.close()


async def test_concurrent_changes_share_commits(url: str):
    batches: list[int] = []
    store = SQLStore(url, lambda num_changes, _: batches.append(num_changes))
    await store.open()
    names = [f"e{number}" for number in range(600)]
    await asyncio.gather(*(store.create(record(name)) for name in names))
    await asyncio.gather(*(store.commit(commit(0, name)) for name in names))
    assert sum(batches) == 1200
    assert max(batches) <= MAX_BATCH
    assert len(batches) <= 12
    assert len(await store.episodes(limit=1000, before=None, where=EVERY)) == 600
    await store.close()


async def test_those_refused_do_not_break_a_shared_commit_up(store: SQLStore, monkeypatch: pytest.MonkeyPatch):
    await store.create(record("a"))
    num_transactions = 0
    write = store._connections.write

    async def counted(function: Callable[[Connection], _T]) -> _T:
        nonlocal num_transactions
        num_transactions += 1
        return await write(function)

    monkeypatch.setattr(store._connections, "write", counted)
    acts = [store.commit(commit(0, name)) for name in ("a", "b")]
    results = await asyncio.gather(*acts, store.create(record("a")), store.create(record("c")), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StepTaken, EpisodeExists, type(None)]
    assert num_transactions == 1


async def test_closing_writes_what_is_on_its_way(url: str):
    store = SQLStore(url)
    await store.open()
    await store.create(record())
    late = asyncio.create_task(store.commit(commit(0)))
    await asyncio.sleep(0)
    await store.close()
    await late
    with pytest.raises(StoreUnavailable):
        await store.commit(commit(1))
    again = SQLStore(url)
    await again.open()
    assert len(await again.steps("e")) == 1
    await again.close()


async def test_a_caller_that_leaves_does_not_tear_a_commit(store: SQLStore, other: SQLStore):
    await asyncio.gather(*(store.create(record(f"e{number}")) for number in range(10)))
    tasks = [asyncio.create_task(store.commit(commit(0, f"e{number}"))) for number in range(10)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()
    assert [len(await other.steps(f"e{number}")) for number in range(10)] == [1] * 10


async def test_callers_that_leave_amid_a_transaction_leave_no_connection_in_it(store: SQLStore):
    await store.create(record())
    await store.commit(commit(0))
    for number in range(40):
        rating = Feedback("e", None, 1, None, f"r{number}", 1.0)
        calls = [store.trajectory("e"), store.add_feedback(rating), store.fork([fork(f"f{number}", "e", 1)])]
        tasks = [asyncio.ensure_future(call) for call in calls]
        for _ in range(number):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await store.commit(commit(1))
    for number in range(20):  # more than the pool has connections
        await store.add_feedback(Feedback("e", None, 2, None, f"r{number}", 1.0))
        assert len(await store.steps("e")) == 2
    assert await store.delete("e")


async def test_replicas_race_for_a_step(store: SQLStore, other: SQLStore):
    """If two replicas commit the same step, exactly one succeeds, and the other gets StepTaken."""
    await store.create(record())
    for index in range(20):
        racers = [replica.commit(commit(index, message=Message(str(replica is store)))) for replica in (store, other)]
        results = await asyncio.gather(*racers, return_exceptions=True)
        assert sorted(map(type, results), key=str) == sorted([type(None), StepTaken], key=str)
        (stored,) = await other.steps("e", index)
        assert stored.message.observation == str(results[0] is None)
    assert len(await other.steps("e")) == 20


async def test_replicas_race_for_many_steps_in_any_order(store: SQLStore, other: SQLStore):
    names = [f"e{number:03}" for number in range(MAX_BATCH)]
    await asyncio.gather(*(store.create(record(name)) for name in names))
    for index in range(4):
        racers = [store.commit(commit(index, name)) for name in names]
        racers += [other.commit(commit(index, name)) for name in reversed(names)]
        results = await asyncio.gather(*racers, return_exceptions=True)
        assert {type(result) for result in results} == {type(None), StepTaken}
        assert sum(result is None for result in results) == len(names)
    assert await num_rows_of(store, names[::50]) == [4] * 6


async def num_rows_of(store: SQLStore, names: list[str]) -> list[int]:
    return [len(await store.steps(name)) for name in names]


async def test_replicas_race_to_open_many_episodes_in_any_order(store: SQLStore, other: SQLStore):
    for number in range(4):
        names = [f"e{number}-{which:03}" for which in range(100)]
        racers = [store.create(record(name)) for name in names] + [other.create(record(name)) for name in names[::-1]]
        results = await asyncio.gather(*racers, return_exceptions=True)
        assert sum(result is None for result in results) == 100
        assert sum(isinstance(result, EpisodeExists) for result in results) == 100
    assert await other.num_active() == 400


async def test_a_fork_has_all_of_its_rows_or_is_refused_when_its_parent_is_deleted(
    store: SQLStore, other: SQLStore, url: str
):
    for number in range(20):
        await store.create(record(f"p{number}"))
        for index in range(3):
            await store.commit(commit(index, f"p{number}"))
        racers = [other.delete(f"p{number}"), store.fork([fork(f"f{number}", f"p{number}", 2)])]
        gone, forked = await asyncio.gather(*racers, return_exceptions=True)
        assert gone is True
        assert forked is None or isinstance(forked, EpisodeGone)
        assert len(await store.steps(f"f{number}")) == (2 if forked is None else 0)
        assert await store.delete(f"f{number}") == (forked is None)
    assert await num_rows(url) == 0


async def test_a_family_deleted_at_once_leaves_no_rows(store: SQLStore, other: SQLStore, url: str):
    for number in range(20):
        await store.create(record(f"p{number}"))
        await store.commit(commit(0, f"p{number}"))
        await store.fork([fork(f"f{number}", f"p{number}", 1)])
        results = await asyncio.gather(store.delete(f"p{number}"), other.delete(f"f{number}"))
        assert results == [True, True]
    assert await num_rows(url) == 0


async def test_a_rating_is_not_left_behind_by_a_delete_and_a_rater_has_one(store: SQLStore, other: SQLStore, url: str):
    for number in range(20):
        name = f"e{number}"
        await store.create(record(name))
        rating = Feedback(name, None, 3, None, "ann", 1.0)
        await asyncio.gather(store.add_feedback(rating), other.add_feedback(replace(rating, rating=4)))
        assert len(await store.feedback(name)) == 1
        racers = (store.add_feedback(replace(rating, rater=None)), other.delete(name))
        results = await asyncio.gather(*racers, return_exceptions=True)
        assert isinstance(results[0], EpisodeGone | Feedback)
    assert await in_database(url, lambda connection: connection.execute(select(ratings)).all()) == []


async def test_a_trajectory_is_of_one_moment(store: SQLStore, other: SQLStore):
    await store.create(record())

    async def act() -> None:
        for index in range(60):
            await other.commit(commit(index))

    acting = asyncio.create_task(act())
    while not acting.done():
        found = await store.trajectory("e")
        assert found is not None
        assert found[0].state.step == len(found[1])
    await acting


async def test_a_deleted_parents_rows_that_no_fork_reads_are_gone(store: SQLStore, url: str):
    await store.create(record())
    for index in range(5):
        await store.commit(commit(index))
    for name, at_step in (("f", 1), ("g", 3)):
        made = record(name)
        await store.fork(
            [StoredEpisode(replace(made.config, parent=("e", at_step)), replace(made.state, step=at_step))]
        )
    for deleted, num_left in (("e", 3), ("g", 1), ("f", 0)):
        await store.delete(deleted)
        assert await num_rows(url) == num_left


async def test_a_failing_database_is_store_unavailable_and_heals(store: SQLStore, url: str):
    await store.create(record())
    await in_database(url, lambda connection: connection.execute(text("ALTER TABLE steps RENAME TO hidden")))
    for call in (store.commit(commit(0)), store.steps("e"), store.delete("e")):
        with pytest.raises(StoreUnavailable, match="steps") as failure:
            await call
        assert "INSERT" not in str(failure.value)
    await in_database(url, lambda connection: connection.execute(text("ALTER TABLE hidden RENAME TO steps")))
    await store.commit(commit(0))
    found = await store.episode("e")
    assert found is not None
    assert found.state.step == 1, "the failed commit wrote nothing"


async def test_a_row_that_another_program_wrote_is_no_act(store: SQLStore, url: str):
    await store.create(record())
    await store.create(record("f"))
    await in_database(url, lambda connection: connection.execute(insert(steps), step_row(step(0))))
    results = await asyncio.gather(store.commit(commit(0)), store.commit(commit(0, "f")), return_exceptions=True)
    assert [type(result) for result in results] == [StepTaken, type(None)]


async def test_refused_change_does_not_affect_others(store: SQLStore):
    names = [f"e{number}" for number in range(8)]
    await asyncio.gather(*(store.create(record(name)) for name in names))
    commits = [commit(0, name) for name in names]
    commits[3] = replace(commits[3], step=replace(commits[3].step, answer={"action": object()}))
    commits[5] = replace(commits[5], step=replace(commits[5].step, idempotency_key="a\0b"))
    results = await asyncio.gather(*map(store.commit, commits), return_exceptions=True)
    assert [type(result) for result in results if result] == [TypeError, ValueError]
    assert await num_rows_of(store, names) == [1, 1, 1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("label", ["a\0b", "\ud800", "x" * 129])
async def test_a_label_that_cannot_be_stored_is_refused(store: SQLStore, label: str):
    creates = [record("tag", tags=[label]), record("group", group=label), record("fine", group="g")]
    results = await asyncio.gather(*map(store.create, creates), return_exceptions=True)
    assert [isinstance(result, ValueError | TypeError) for result in results] == [True, True, False]
    with pytest.raises(ValueError, match="rater"):
        await store.add_feedback(Feedback("fine", None, 3, None, label, 1.0))
    with pytest.raises((ValueError, TypeError)):
        await store.fork([fork("f", "fine", 0, group=label)])
    assert [row.config.episode_id for row in await store.episodes(limit=9, before=None)] == ["fine"]


async def test_a_filter_or_cursor_that_nothing_can_match_finds_nothing(store: SQLStore):
    await store.create(record())
    for name in ("tenant", "tag", "group", "policy", "profile"):
        for value in ("a\0b", "\ud800"):
            query: Any = {"tenant": value} if name == "tenant" else {"where": {name: value}}
            assert await store.episodes(limit=9, before=None, **query) == []
    nowhere = [(float("nan"), "e"), (float("-inf"), "e"), (2.0, "a\0b"), (2.0, "\ud800")]
    assert [await store.episodes(limit=9, before=before) for before in nowhere] == [[]] * 4
    assert len(await store.episodes(limit=9, before=(float("inf"), "e"))) == 1
    assert len(await store.episodes(limit=9, before=(1e300, "e"))) == 1


async def test_what_a_tombstone_keeps_is_no_text_of_the_episode(store: SQLStore, url: str):
    await store.create(record("e", goal="secret", tags=["secret"], group="secret"))
    await store.delete("e")
    row = await in_database(url, lambda connection: connection.execute(select(episodes)).one())
    assert "secret" not in str(row)


async def test_an_episode_lost_by_another_program_is_no_act(store: SQLStore, url: str):
    await store.create(record())
    await in_database(url, lambda connection: connection.execute(delete(episodes)))
    with pytest.raises(StepTaken):
        await store.commit(commit(0))
    await in_database(url, lambda connection: connection.execute(update(episodes).values(step=3)))
