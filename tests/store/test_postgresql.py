"""Failures of a PostgreSQL server: a crash, a broken connection, a server that does not answer, a wrong password."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from service.store.base import EpisodeExists, StepTaken, StoreRefused, StoreUnavailable
from service.store.connections import Patience
from service.store.sql import SQLStore
from service.trajectory import Feedback, StoredVersion
from tests.store.test_stores import commit, record
from tests.support.postgres import Postgres

IMPATIENT = Patience(lock_s=0.2, transaction_s=1.0, start_s=0.5)
_CUT = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'episodic'"


@pytest.fixture
async def store(own_server: Postgres) -> AsyncIterator[SQLStore]:
    opened = SQLStore(own_server.new(), patience=IMPATIENT)
    await opened.open()
    yield opened
    await opened.close()


def database(store: SQLStore) -> str:
    return store._connections._url.database  # pyright: ignore


async def play(store: SQLStore, name: str, num_steps: int, fault: Callable[[], None] = lambda: None) -> None:
    """Commits one step after another, and calls `fault` after half of them. If the result of a commit is unknown, it
    reads the episode again, as the service does."""
    index = 0
    while index < num_steps:
        try:
            await store.commit(commit(index, name))
        except (StepTaken, StoreUnavailable):
            num_stored = await num_steps_of(store, name)
            assert num_stored in (index, index + 1), "all acknowledged steps are stored, and no other"
            index = num_stored
            continue
        index += 1
        if index == num_steps // 2:
            await asyncio.to_thread(fault)


def restart(server: Postgres) -> None:
    server.stop("immediate")
    server.start()


async def num_steps_of(store: SQLStore, name: str) -> int:
    """Returns the number of stored steps. Waits until the store can be read."""
    while True:
        try:
            return len(await store.steps(name))
        except StoreUnavailable:
            await asyncio.sleep(0.02)


async def test_a_restarted_server_is_used_again_at_once(store: SQLStore, own_server: Postgres):
    await store.create(record())
    await asyncio.gather(*(store.steps("e") for _ in range(8)))
    own_server.stop("immediate")
    for call in (store.commit(commit(0)), store.steps("e")):
        with pytest.raises(StoreUnavailable):
            await call
    own_server.start()
    await asyncio.gather(*(store.steps("e") for _ in range(8)))
    await store.commit(commit(0))


async def test_a_server_that_was_restarted_while_nobody_looked_is_no_error(store: SQLStore, own_server: Postgres):
    await store.create(record())
    await asyncio.to_thread(restart, own_server)
    await store.commit(commit(0))
    assert len(await store.steps("e")) == 1


async def test_crash_during_commits_keeps_acknowledged_commits(store: SQLStore, own_server: Postgres):
    names = [f"e{number}" for number in range(6)]
    for name in names:
        await store.create(record(name))

    others = [play(store, name, 60) for name in names[1:]]
    await asyncio.gather(play(store, names[0], 60, lambda: restart(own_server)), *others)
    assert [[row.index for row in await store.steps(name)] for name in names] == [list(range(60))] * 6


async def test_broken_connections_keep_acknowledged_commits(store: SQLStore, own_server: Postgres):
    names = [f"e{number}" for number in range(6)]
    for name in names:
        await store.create(record(name))
    playing = asyncio.gather(*(play(store, name, 30) for name in names))
    num_cut = 0
    while not playing.done():
        num_cut += int(await asyncio.to_thread(own_server.execute, _CUT))
        await asyncio.sleep(0.05)
    await playing
    assert num_cut > 0
    assert [[row.index for row in await store.steps(name)] for name in names] == [list(range(30))] * 6


async def test_a_connection_cut_amid_a_transaction_leaves_nothing_of_it(store: SQLStore, own_server: Postgres):
    await store.create(record())

    def write(connection: Connection) -> None:
        connection.execute(text("DELETE FROM episodes"))
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(StoreUnavailable):
        await store._connections.write(write)
    assert await store.num_active() == 1
    await store.commit(commit(0))


async def test_unresponsive_server_causes_503_and_recovers(store: SQLStore, own_server: Postgres):
    await store.create(record())
    own_server.pause()
    try:
        calls = [store.commit(commit(0)), *(store.steps("e") for _ in range(12))]  # more than the pool has connections
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {StoreUnavailable}
    finally:
        own_server.resume()
    await play(store, "e", 3)
    assert len(await store.steps("e")) == 3


async def test_a_lock_that_another_holds_is_unavailable_until_it_is_gone(store: SQLStore, own_server: Postgres):
    await store.create(record())
    await store.create(record("f"))
    holder = SQLStore(own_server.url(database(store)), patience=Patience())
    is_locked = asyncio.Event()
    release = asyncio.Event()

    async def hold() -> None:
        async with holder._connections._engine.begin() as connection:  # pyright: ignore
            await connection.execute(text("SELECT 1 FROM episodes WHERE episode_id = 'e' FOR UPDATE"))
            is_locked.set()
            await release.wait()

    holding = asyncio.create_task(hold())
    await is_locked.wait()
    for call in (
        store.commit(commit(0)),
        store.delete("e"),
        store.add_feedback(Feedback("e", None, 1, None, None, 1.0)),
    ):
        with pytest.raises(StoreUnavailable, match="lock timeout"):
            await call
    assert await store.steps("e") == [], "a read does not wait for the lock"
    await store.commit(commit(0, "f"))
    release.set()
    await holding
    await store.commit(commit(0))
    await holder.close()


@asynccontextmanager
async def at_once(own_server: Postgres, url: str, statement: str) -> AsyncIterator[tuple[SQLStore, SQLStore]]:
    """Makes two replicas run transactions at the same time.

    Another connection executes the statement, which locks a row. When the `with` block ends, this waits until a
    transaction of each replica waits for the lock. Then the statement is rolled back, and both continue.
    """
    one, two, holder = (SQLStore(url) for _ in range(3))
    await one.open()
    await two.open()
    async with holder._connections._engine.connect() as connection:  # pyright: ignore
        await connection.execute(text(statement))
        yield one, two
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        while await asyncio.to_thread(own_server.execute, waiting) != "2":
            pass
    await holder.close()


NAMES = [f"e{number:03}" for number in range(100)]


async def test_replicas_that_open_the_same_episodes_do_not_wait_in_a_circle(own_server: Postgres):
    url = own_server.new()
    first = SQLStore(url)
    await first.open()
    await first.close()
    insert = """INSERT INTO episodes VALUES ('e050', '{}', '', '', 0, 0, 'active', NULL, NULL, 0, 0, 0)"""
    async with at_once(own_server, url, insert) as (one, two):
        calls = [one.create(record(name)) for name in NAMES] + [two.create(record(name)) for name in NAMES[::-1]]
        racing = asyncio.gather(*calls, return_exceptions=True)
    kinds = Counter(type(result) for result in await racing)
    assert kinds == {type(None): len(NAMES), EpisodeExists: len(NAMES)}
    await one.close()
    await two.close()


async def test_replicas_that_store_the_same_policy_at_the_same_time_both_succeed(own_server: Postgres):
    url = own_server.new()
    async with SQLStore(url) as one, SQLStore(url) as other:
        for number in range(20):
            version = StoredVersion(f"adapter-{number}", "digest", "v", 8, 1.0)
            await asyncio.gather(*(store.put_version(version, move_alias=True) for store in (one, other)))
        catalog = await one.catalog()
        assert len(catalog.versions) == len(catalog.aliases) == 20
        assert not catalog.previous, "an alias moved to the version that it already pointed to"


async def test_replicas_that_move_an_alias_at_the_same_time_leave_one_history(own_server: Postgres):
    url = own_server.new()
    async with SQLStore(url) as one, SQLStore(url) as other:
        await one.put_version(StoredVersion("p", "first", "v", 8, 1.0), move_alias=True)
        for number in range(10):
            version = StoredVersion("p", f"digest-{number}", "v", 8, 1.0)
            await asyncio.gather(*(store.put_version(version, move_alias=True) for store in (one, other)))
        for number in reversed(range(9)):
            rolled_back = await one.roll_back("p")
            assert rolled_back is not None
            assert rolled_back.digest == f"digest-{number}"


async def test_concurrent_acts_do_not_deadlock(own_server: Postgres):
    url = own_server.new()
    first = SQLStore(url)
    await first.open()
    await asyncio.gather(*(first.create(record(name)) for name in NAMES))
    await first.close()
    async with at_once(own_server, url, "SELECT 1 FROM episodes WHERE episode_id = 'e050' FOR UPDATE") as (one, two):
        calls = [one.commit(commit(0, name)) for name in NAMES] + [two.commit(commit(0, name)) for name in NAMES[::-1]]
        racing = asyncio.gather(*calls, return_exceptions=True)
    kinds = Counter(type(result) for result in await racing)
    assert kinds == {type(None): len(NAMES), StepTaken: len(NAMES)}
    await one.close()
    await two.close()


async def test_statement_timeout(store: SQLStore):
    with pytest.raises(StoreUnavailable):
        await store._connections.read(lambda connection: connection.execute(text("SELECT pg_sleep(60)")))
    assert await store.num_active() == 0


async def test_locks_of_a_disconnected_replica_are_released(store: SQLStore, own_server: Postgres):
    await store.create(record())
    lost = SQLStore(own_server.url(database(store)), patience=Patience(transaction_s=0.2))
    with contextlib.suppress(SQLAlchemyError):  # its commit fails, because the server has ended the transaction
        async with lost._connections._engine.begin() as connection:  # pyright: ignore
            await connection.execute(text("SELECT 1 FROM episodes FOR UPDATE"))
            await play(store, "e", 1)
    await lost.close()


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("password", "wrong", "password authentication failed"),
        ("username", "nobody_at_all", "password authentication failed"),
        ("database", "nowhere", "does not exist"),
    ],
)
async def test_refused_login_fails_immediately(own_server: Postgres, part: str, value: str, word: str):
    url = make_url(own_server.url()).set(**{part: value})  # pyright: ignore
    store = SQLStore(url.render_as_string(hide_password=False), patience=Patience(start_s=3600))
    with pytest.raises(StoreRefused, match=word) as refusal:
        await store.open()
    assert f"{url.database!r} at 127.0.0.1:{own_server.port}" in str(refusal.value)
    assert str(url.password) not in str(refusal.value)
    await store.close()


async def test_unreachable_server_fails_after_the_timeout(own_server: Postgres):
    url = make_url(own_server.url()).set(port=1)
    store = SQLStore(url.render_as_string(hide_password=False), patience=IMPATIENT)
    with pytest.raises(StoreRefused, match=r"127\.0\.0\.1:1 cannot be reached") as refusal:
        await store.open()
    assert own_server.password not in str(refusal.value)
    await store.close()


async def test_a_server_that_comes_later_is_waited_for(own_server: Postgres):
    url = own_server.new()
    own_server.stop("fast")
    store = SQLStore(url, patience=Patience(start_s=60))
    opening = asyncio.create_task(store.open())
    await asyncio.sleep(0.1)
    assert not opening.done()
    await asyncio.to_thread(own_server.start)
    await opening
    assert await store.num_active() == 0
    await store.close()


@pytest.mark.parametrize(("options", "word"), [("?colour=red", "options"), ("?sslmode=require", "SSL")])
async def test_the_urls_options_are_read(own_server: Postgres, options: str, word: str):
    store = SQLStore(own_server.url() + options, patience=IMPATIENT)
    with pytest.raises(StoreRefused, match=word):
        await store.open()
    await store.close()


async def test_the_plain_url_is_served_too(own_server: Postgres):
    store = SQLStore(own_server.new().replace("+asyncpg", "") + "?sslmode=disable")
    await store.open()
    await store.create(record())
    with pytest.raises(StepTaken):
        await store.commit(commit(1))
    await store.close()


async def test_closing_does_not_wait_for_a_server_that_answers_nothing(own_server: Postgres):
    store = SQLStore(own_server.new(), patience=IMPATIENT)
    await store.open()
    await asyncio.gather(*(store.steps("e") for _ in range(8)))
    own_server.pause()
    try:
        await asyncio.wait_for(store.close(), 60)
    finally:
        own_server.resume()
