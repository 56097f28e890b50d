"""`python -m bench.large_store`: what the store's operations cost with 10 million steps, and how their queries run.

It fills a SQLite file, or a PostgreSQL database, with generated episodes, and compares each operation with the same one
on a small store. Then it prints the plans of all queries. PostgreSQL is started from the wheel that the tests use,
unless --store names a database, which must be empty.
"""

import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
import uvloop
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, event, text

from bench.contenders import ROOT
from bench.stored_episodes import fill, in_database, name
from service.filters import EpisodeFilter
from service.store import schema
from service.store.base import Commit, Ordering
from service.store.sql import SQLStore
from service.trajectory import EpisodeState, StoredEpisode
from tests.support import postgres

_NUM_SMALL = 1_000
"""Episodes of the small store."""
_LARGE_TABLES = ("episodes", "steps", schema.tags.name, schema.entries.name)
_WHOLE = ("SCAN", "Seq Scan on", "Parallel Seq Scan on")
"""How a line of a plan that reads a whole table starts."""
_PAGES: list[tuple[str, EpisodeFilter]] = [
    ("the first 100", {}),
    ("by status", {"status": "ended"}),
    ("by status (rare)", {"status": "active"}),
    ("by env and success", {"env": "lake", "success": True}),
    ("by env (rare)", {"env": "rare"}),
    ("by tag", {"tag": "run"}),
    ("by tag (rare)", {"tag": "t7"}),
    ("by group", {"group": "g100"}),
    ("by policy", {"policy": "base"}),
    ("by policy (rare)", {"policy": "rare"}),
    ("by profile (rare)", {"profile": "rare"}),
    ("by metadata", {"metadata": {"env": "lake"}}),
    ("by metadata (rare)", {"metadata": {"seed": 7}}),
    ("by tag and policy", {"tag": "run", "policy": "base"}),
]

_console = Console(width=180, highlight=False)
Operation = Callable[[], Awaitable[Any]]
Statement = tuple[str, tuple[Any, ...]]


@dataclass(slots=True)
class _Measured:
    """Milliseconds of each operation, and the statements that it executed."""

    ms: dict[str, float] = field(default_factory=dict[str, float])
    statements: dict[str, list[Statement]] = field(default_factory=dict[str, list[Statement]])


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
    small, large = _Measured(), _Measured()
    async with SQLStore(url) as store:
        await fill(url, 0, _NUM_SMALL, length)
        await _measure(store, small, "small", _NUM_SMALL)
        began = time.perf_counter()
        await fill(url, _NUM_SMALL, num_episodes, length)
        seconds = time.perf_counter() - began
        if not url.startswith("sqlite"):
            await in_database(url, lambda connection: connection.execute(text("ANALYZE")))  # as autovacuum does
        await _measure(store, large, "large", num_episodes)
    size = await in_database(url, _size)
    num_steps = num_episodes * length
    _console.print(f"{num_episodes:,} episodes, {num_steps:,} steps, generated in {seconds:.0f} s; ", end="")
    _console.print(f"{size / 1e9:.2f} GB, {size / num_steps:.0f} bytes a step")
    _console.print(_table(small, large, length))
    plans = await in_database(url, lambda connection: _plans(connection, large.statements))
    scans = [sql for found in plans.values() for sql, plan in found if _scans(plan)]
    for operation, found in plans.items():
        _console.print(f"{operation}:", *(f"  {' > '.join(plan)}" for _, plan in found), sep="\n", markup=False)
    _console.print(f"{sum(map(len, plans.values()))} statements; {len(scans)} read a whole table", *scans, sep="\n  ")


async def _measure(store: SQLStore, measured: _Measured, prefix: str, num_episodes: int) -> None:
    """Runs each operation several times after a first one, and stores the median."""
    generator = random.Random(1)  # noqa: S311 - not a secret

    def some() -> str:
        return name(generator.randrange(num_episodes))

    def page(where: EpisodeFilter, sort: Literal["created", "return", "length", "rating"] = "created") -> Operation:
        ordering = Ordering(sort)
        return lambda: store.episodes(limit=100, before=None, tenant="default", where=where, ordering=ordering)

    newest = name(num_episodes - 1)  # the oldest ones are deleted
    template = await store.episode(newest)
    assert template is not None
    last = (await store.steps(newest, 0))[0]
    opened, appended = ((f"{prefix}-{number}" for number in range(31)) for _ in range(2))
    operations: list[tuple[str, int, Operation]] = [
        ("open an episode", 30, _opening(store, template, opened)),
        ("append a step", 30, _appending(store, last, appended)),
        ("read an episode", 30, lambda: store.trajectory(some())),
        ("read the head of an episode", 30, lambda: store.episode(some())),
        ("read one step", 30, lambda: store.steps(some(), 3)),
        *((f"list {label}", 10, page(where)) for label, where in _PAGES),
        ("list 100 from the middle", 10, _middle(store, num_episodes)),
        *((f"list by {sort}", 3, page({}, sort)) for sort in ("return", "length", "rating")),
        ("export 1,000 episodes", 3, lambda: _export(store, 1_000)),
        ("count the active episodes of a tenant", 10, lambda: store.num_active("default")),
        ("count all active episodes", 10, store.num_active),
        ("find the next expiry", 10, store.next_expiry),
        ("find expired episodes", 10, lambda: store.expired(1e9, 100)),
        ("delete an episode", 20, lambda: store.delete(some())),
        ("delete old episodes", 5, lambda: store.delete_ended(1e9, 10)),
        ("remove old tombstones", 5, lambda: store.remove_tombstones(1e12, 2)),
    ]
    for label, times, operation in operations:
        with _recording(store, measured.statements.setdefault(label, [])):
            await operation()
        found: list[float] = []
        for _ in range(times):
            began = time.perf_counter()
            await operation()
            found.append((time.perf_counter() - began) * 1e3)
        measured.ms[label] = median(found)


def _opening(store: SQLStore, template: StoredEpisode, names: Iterator[str]) -> Operation:
    return lambda: store.create(
        replace(template, config=replace(template.config, episode_id=next(names)), state=EpisodeState())
    )


def _appending(store: SQLStore, template: Any, names: Iterator[str]) -> Operation:
    return lambda: store.commit(Commit(replace(template, episode_id=next(names), index=0), EpisodeState(step=1)))


def _middle(store: SQLStore, num_episodes: int) -> Operation:
    place = (float(num_episodes // 2), name(num_episodes // 2))
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


@contextmanager
def _recording(store: SQLStore, statements: list[Statement]) -> Iterator[None]:
    engine: Any = store._connections._engine  # pyright: ignore[reportPrivateUsage]
    engine = getattr(engine, "sync_engine", engine)

    def record(_c: Any, _cursor: Any, sql: str, parameters: Any, _context: Any, many: bool) -> None:
        if not sql.startswith("BEGIN") and sql not in (known for known, _ in statements):
            statements.append((sql, tuple(parameters[0] if many else parameters)))

    event.listen(engine, "before_cursor_execute", record)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", record)


def _size(connection: Connection) -> int:
    if connection.dialect.name == "sqlite":
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        return pages * connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    return connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()


def _plans(
    connection: Connection, operations: dict[str, list[Statement]]
) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Returns the statements of each operation that read something, with the lines of their plans. A plan that an
    earlier operation has had is left out."""
    is_sqlite = connection.dialect.name == "sqlite"
    verb = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN (COSTS OFF)"
    known: set[tuple[str, tuple[str, ...]]] = set()
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for operation, statements in operations.items():
        for sql, parameters in statements:
            rows = [str(row[-1]) for row in connection.exec_driver_sql(f"{verb} {sql}", parameters)]
            lines = rows if is_sqlite else [row for place, row in enumerate(rows) if not place or "->" in row]
            plan = sql, tuple(line.strip().removeprefix("->").strip() for line in lines)
            if plan[1] and plan not in known:
                known.add(plan)
                found.setdefault(operation, []).append(plan)
    return found


def _scans(plan: tuple[str, ...]) -> bool:
    starts = tuple(f"{verb} {table}" for table in _LARGE_TABLES for verb in _WHOLE)
    return any(line.startswith(starts) and "USING" not in line for line in plan)


def _table(small: _Measured, large: _Measured, length: int) -> Table:
    table = Table("operation", f"ms with {_NUM_SMALL * length:,} steps", "ms with all steps", "ratio")
    for operation, ms in large.ms.items():
        table.add_row(operation, f"{small.ms[operation]:.2f}", f"{ms:.2f}", f"{ms / small.ms[operation]:.2f}")
    return table


if __name__ == "__main__":
    typer.run(main)
