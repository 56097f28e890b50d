"""`python -m bench.large_store`: what the store's operations cost with 10 million steps, and how their queries run.

It fills a SQLite file, or a PostgreSQL database, with generated episodes, and compares each operation with the same one
on a small store. Then it lists the statements whose plan reads a whole table. PostgreSQL is started from the wheel that
the tests use, unless --store names a database, which must be empty.
"""

import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, event, make_url, text

from bench.contenders import ROOT
from service.store import schema
from service.store.base import Commit
from service.store.connections import Connections, Patience
from service.store.postgresql import PostgreSQLConnections
from service.store.sql import SQLStore
from service.store.sqlite import SQLiteConnections
from service.trajectory import EpisodeState, StoredEpisode
from tests.support import postgres

_CHUNK = 2_000
"""Episodes that are generated in one transaction."""
_NUM_SMALL = 1_000
"""Episodes of the small store."""
_PATIENCE = Patience(lock_s=600.0, transaction_s=3600.0)
_LARGE_TABLES = ("episodes", "steps", schema.tags.name)

_REQUEST = """{"action_space":{"type":"discrete","actions":["left","down","right","up"]},"metadata":{"env":"lake"}}"""
_MESSAGE = """{"observation":"row 2, column 2","reward":0.0}"""
_ANSWER = (
    '{"episode_id":"e000000000","step":10,"action":"right","text":"right","reasoning":null,"action_probs":'
    '{"left":0.01,"down":0.02,"right":0.96,"up":0.01},"legal_mass":0.999,"logprob":-0.04,"finish_reason":"stop",'
    '"parse_failure":null,"done":false,"policy_version":"83932aeeb889","usage":{"prompt_tokens":212,"cached_tokens":'
    '192,"completion_tokens":2}}'
)
_NUM_TOKENS = 14

_console = Console(width=150, highlight=False)
Operation = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class _Measured:
    """Milliseconds of each operation, and the statements that it executed."""

    ms: dict[str, float] = field(default_factory=dict[str, float])
    statements: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])


def main(
    steps: Annotated[int, typer.Option(help="Steps in the store.")] = 10_000_000,
    length: Annotated[int, typer.Option(min=1, help="Steps of an episode.")] = 100,
    kind: Annotated[str, typer.Option(help="sqlite or postgresql.")] = "sqlite",
    store: Annotated[str | None, typer.Option(help="URL of an empty database. Default: a temporary one.")] = None,
) -> None:
    """Measure the operations of a large store."""
    if steps < 2 * _NUM_SMALL * length:
        raise typer.BadParameter(
            f"at least {2 * _NUM_SMALL * length:,} for episodes of {length} steps", param_hint="--steps"
        )
    with _database(kind, store) as url:
        uvloop.run(_run(url, steps // length, length))


@contextmanager
def _database(kind: str, url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
    elif kind == "postgresql":
        with postgres.running() as server:
            yield server.new()
    else:
        (ROOT / "data").mkdir(exist_ok=True)  # /tmp may be in memory
        with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data") as folder:
            yield f"sqlite:///{Path(folder) / 'large.db'}"


async def _run(url: str, num_episodes: int, length: int) -> None:
    async with SQLStore(url) as store:
        small, large = _Measured(), _Measured()
        await _fill(url, 0, _NUM_SMALL, length)
        await _measure(store, small, "small", _NUM_SMALL)
        began = time.perf_counter()
        for first in range(_NUM_SMALL, num_episodes, _CHUNK):
            await _fill(url, first, min(first + _CHUNK, num_episodes), length)
        seconds = time.perf_counter() - began
        await _in_database(url, lambda connection: connection.execute(text("ANALYZE")))
        await _measure(store, large, "large", num_episodes)
    size = await _in_database(url, _size)
    plans = await _in_database(url, lambda connection: _plans(connection, large.statements))
    num_steps = num_episodes * length
    _console.print(f"{num_episodes:,} episodes, {num_steps:,} steps, generated in {seconds:.0f} s; ", end="")
    _console.print(f"{size / 1e9:.2f} GB, {size / num_steps:.0f} bytes a step")
    _console.print(_table(small, large, length))
    scans = [sql for sql, plan in plans.items() if _scans(plan)]
    _console.print(f"{len(plans)} statements; {len(scans)} read a whole table")
    for sql in scans:
        _console.print(f"  {sql}\n{plans[sql]}", markup=False)


async def _measure(store: SQLStore, measured: _Measured, prefix: str, num_episodes: int) -> None:
    """Runs each operation several times after a first one, and stores the median."""
    generator = random.Random(1)  # noqa: S311 - not a secret

    def some() -> str:
        return _name(generator.randrange(num_episodes))

    def page(**where: Any) -> Operation:
        return lambda: store.episodes(limit=100, before=None, tenant="default", where=where)  # type: ignore[arg-type]

    names = [f"{prefix}-{number}" for number in range(31)]
    template = await store.episode(_name(0))
    assert template is not None
    last = (await store.steps(_name(0), 0))[0]
    appended = iter(names)
    operations: list[tuple[str, int, Operation]] = [
        ("open an episode", 30, _opening(store, template, iter(names))),
        ("append a step", 30, _appending(store, last, appended)),
        ("read an episode", 30, lambda: store.trajectory(some())),
        ("read the head of an episode", 30, lambda: store.episode(some())),
        ("list the first 100", 10, page()),
        ("list 100 by env and success", 10, page(env="lake", success=True)),
        ("list 100 by tag", 10, page(tag="t7")),
        ("list 100 from the middle", 10, _middle(store, num_episodes)),
        ("count active episodes", 5, lambda: store.num_active("default")),
        ("find the next expiry", 10, store.next_expiry),
        ("export 1,000 episodes", 3, lambda: _export(store, 1_000)),
        ("delete an episode", 20, lambda: store.delete(some())),
    ]
    for name, times, operation in operations:
        async with _recording(store, measured):
            await operation()
            found: list[float] = []
            for _ in range(times):
                began = time.perf_counter()
                await operation()
                found.append((time.perf_counter() - began) * 1e3)
            measured.ms[name] = median(found)


def _opening(store: SQLStore, template: StoredEpisode, names: Iterator[str]) -> Operation:
    return lambda: store.create(
        replace(template, config=replace(template.config, episode_id=next(names)), state=EpisodeState())
    )


def _appending(store: SQLStore, template: Any, names: Iterator[str]) -> Operation:
    return lambda: store.commit(Commit(replace(template, episode_id=next(names), index=0), EpisodeState(step=1)))


def _middle(store: SQLStore, num_episodes: int) -> Operation:
    place = (float(num_episodes // 2), _name(num_episodes // 2))
    return lambda: store.episodes(limit=100, before=place, tenant="default")


async def _export(store: SQLStore, limit: int) -> None:
    """Reads what GET /export reads for this number of lines."""
    place: Any = None
    for _ in range(0, limit, 100):
        page = await store.episodes(limit=100, before=place, tenant="default", where={"status": "ended"})
        for listed in page:
            await store.trajectory(listed.config.episode_id)
            await store.feedback(listed.config.episode_id)
        place = (page[-1].config.created_at, page[-1].config.episode_id)


@asynccontextmanager
async def _recording(store: SQLStore, measured: _Measured) -> AsyncIterator[None]:
    engine: Any = store._connections._engine  # pyright: ignore[reportPrivateUsage]
    engine = getattr(engine, "sync_engine", engine)

    def record(_c: Any, _cursor: Any, sql: str, parameters: Any, _context: Any, many: bool) -> None:
        if not sql.startswith("BEGIN"):
            measured.statements[sql] = tuple(parameters[0] if many else parameters)

    event.listen(engine, "before_cursor_execute", record)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", record)


def _name(number: int) -> str:
    return f"e{number:09d}"


async def _in_database(url: str, function: Callable[[Connection], Any]) -> Any:
    kind = SQLiteConnections if url.startswith("sqlite") else PostgreSQLConnections
    connections: Connections = kind(make_url(url), _PATIENCE)
    try:
        return await connections.write(function)
    finally:
        await connections.close()


async def _fill(url: str, first: int, end: int, length: int) -> None:
    await _in_database(url, lambda connection: _insert(connection, first, end, length))


def _insert(connection: Connection, first: int, end: int, length: int) -> None:
    """Adds the episodes first:end, which have ended, with their steps and a tag each."""
    is_sqlite = connection.dialect.name == "sqlite"

    def series(name: str, low: int, high: int) -> str:
        if is_sqlite:
            more = f"SELECT {name} + 1 FROM n WHERE {name} < {high - 1}"  # noqa: S608
            return f"(WITH RECURSIVE n({name}) AS (SELECT {low} UNION ALL {more}) SELECT {name} FROM n)"  # noqa: S608
        return f"(SELECT generate_series({low}, {high - 1}) AS {name}) AS {name}_series"

    def blob(size: int) -> str:
        return f"zeroblob({size})" if is_sqlite else f"decode(repeat('00', {size}), 'hex')"

    name = "printf('e%09d', i)" if is_sqlite else "'e' || lpad(CAST(i AS text), 9, '0')"
    episodes = {
        **{"episode_id": name, "created_at": "i", "step": str(length), "status": "'ended'", "tenant": "'default'"},
        **{"request": f"'{_REQUEST}'", "digest": blob(16), "policy_version": "'v'", "episode_return": "1"},
        **{"num_tokens": str(length * _NUM_TOKENS), "updated_at": "i", "ended_at": "i", "label_version": "1"},
        **{"env": "'lake'", "success": "i % 2", "stop_reason": "'terminated'"},
    }
    steps = {
        **{"episode_id": name, "step": "s", "message": f"'{_MESSAGE}'", "closing": "0", "answer": f"'{_ANSWER}'"},
        **{"token_ids": blob(4 * _NUM_TOKENS), "loss_mask": blob(_NUM_TOKENS), "logprobs": blob(4 * _NUM_TOKENS)},
        **{"digest": blob(16), "window_start": "1", "created_at": "i"},
    }
    tags = {"episode_id": name, "tag": "'t' || (i % 100)"}
    numbers = series("i", first, end)
    rows = {"episodes": (episodes, numbers), schema.tags.name: (tags, numbers)}
    rows["steps"] = (steps, f"{numbers} CROSS JOIN {series('s', 0, length)}")
    for table, (row, source) in rows.items():
        sql = f"INSERT INTO {table} ({', '.join(row)}) SELECT {', '.join(row.values())} FROM {source}"  # noqa: S608
        connection.exec_driver_sql(sql)


def _size(connection: Connection) -> int:
    if connection.dialect.name == "sqlite":
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        return pages * connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    return connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()


def _plans(connection: Connection, statements: dict[str, tuple[Any, ...]]) -> dict[str, str]:
    verb = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
    found: dict[str, str] = {}
    for sql, parameters in statements.items():
        rows = list(connection.exec_driver_sql(f"{verb} {sql}", parameters))
        found[sql] = "\n".join(str(row[-1]) for row in rows)
    return found


def _scans(plan: str) -> bool:
    lines = [line.strip().removeprefix("-> ").strip() for line in plan.splitlines()]
    starts = tuple(f"{verb} {table}" for table in _LARGE_TABLES for verb in ("SCAN", "Seq Scan on"))
    return any(line.startswith(starts) and "USING" not in line for line in lines)


def _table(small: _Measured, large: _Measured, length: int) -> Table:
    table = Table("operation", f"ms with {_NUM_SMALL * length:,} steps", "ms with all steps", "ratio")
    for name, ms in large.ms.items():
        table.add_row(name, f"{small.ms[name]:.2f}", f"{ms:.2f}", f"{ms / small.ms[name]:.2f}")
    return table


if __name__ == "__main__":
    typer.run(main)
