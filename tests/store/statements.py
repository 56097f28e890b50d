"""Records the SQL statements of a release, and runs recorded ones: old and new replicas share one database.

`python -m tests.store.statements` writes the statements of this version to `tests/store/releases/HEAD_REVISION.json`,
for the tests of the next version.
"""

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event

from service.store.sql import SQLStore
from service.trajectory import EpisodeState, Feedback, StopReason, StoredEpisode, StoredKey, StoredVersion
from tests.store.test_stores import commit, fork, record
from tests.support.databases import in_database

FOLDER = Path(__file__).parent / "releases"

Statement = dict[str, Any]
"""`sql` and `parameters` as the driver receives them. Statements of an operation that only reads also have `rows`."""


def _opened(name: str, **request: Any) -> StoredEpisode:
    return StoredEpisode(record(name, **request).config, EpisodeState(updated_at=1.0, expires_at=50.0))


SCENARIO: list[tuple[str, Callable[[SQLStore], Awaitable[Any]]]] = [
    ("open", lambda store: store.create(_opened("a", group="g", tags=["x", "y"], metadata={"env": "lake", "seed": 7}))),
    ("open another tenant's", lambda store: store.create(_opened("acme:a", goal="win"))),
    ("open one to delete", lambda store: store.create(_opened("gone", tags=["x"], metadata={"env": "lake"}))),
    ("act", lambda store: store.commit(commit(0, "a"))),
    ("act again", lambda store: store.commit(commit(1, "a", idempotency_key="k"))),
    ("act in the one to delete", lambda store: store.commit(commit(0, "gone"))),
    ("fork", lambda store: store.fork([fork("f", "a", 1, metadata={"env": "lake"}), fork("h", "gone", 1)])),
    ("act in a fork", lambda store: store.commit(commit(1, "f"))),
    ("fork the fork", lambda store: store.fork([fork("ff", "f", 2)])),
    ("end", lambda store: store.commit(commit(2, "a", ends=StopReason.TERMINATED))),
    ("rate", lambda store: store.add_feedback(Feedback("a", None, 4, "good", "ann", 3.0))),
    ("rate again", lambda store: store.add_feedback(Feedback("a", None, 5, None, "ann", 4.0))),
    ("rate without a name", lambda store: store.add_feedback(Feedback("a", 1, 3, None, None, 5.0))),
    ("delete", lambda store: store.delete("gone")),
    ("delete a missing one", lambda store: store.delete("nobody")),
    ("load an adapter", lambda store: store.put_version(StoredVersion("p", "d", "v", 8, 1.0), move_alias=True)),
    ("add a key", lambda store: store.add_key(StoredKey("k", b"\1" * 32, "acme", ("act",), 1.0))),
    ("revoke a key", lambda store: store.revoke_key("k", 2.0)),
    ("read an episode", lambda store: store.episode("a")),
    ("read steps", lambda store: store.steps("ff")),
    ("read a step", lambda store: store.steps("ff", 1)),
    ("read a trajectory", lambda store: store.trajectory("a")),
    ("list", lambda store: store.episodes(limit=9, before=None, tenant="default", where={})),
    ("list the next page", lambda store: store.episodes(limit=9, before=(5.0, "f"), tenant="default", where={})),
    (
        "list with filters",
        lambda store: store.episodes(
            limit=9, before=None, tenant="default", where={"status": "ended", "group": "g", "policy": "p", "tag": "x"}
        ),
    ),
    ("count", lambda store: store.num_active("default")),
    ("next expiry", lambda store: store.next_expiry()),
    ("expired", lambda store: store.expired(99.0, 9)),
    ("ratings", lambda store: store.feedback("a")),
    ("adapters", lambda store: store.catalog()),
    ("keys", lambda store: store.keys()),
]
"""What a replica does, operation by operation. The data of each depends on the earlier ones, not on who did them."""


@contextmanager
def recording(store: SQLStore) -> Iterator[list[Statement]]:
    """Records the statements that the store executes inside the context."""
    engine: Any = store._connections._engine  # pyright: ignore
    engine = getattr(engine, "sync_engine", engine)
    found: list[Statement] = []

    def record_one(_c: Any, _cursor: Any, sql: str, parameters: Any, _context: Any, many: bool) -> None:
        if sql not in ("BEGIN", "BEGIN IMMEDIATE"):
            found.append({"sql": sql, "parameters": [list(one) for one in (parameters if many else [parameters])]})

    event.listen(engine, "before_cursor_execute", record_one)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", record_one)


def run(statement: Statement) -> Callable[[Connection], list[list[Any]] | None]:
    """Returns a function that executes a recorded statement, and returns its rows if it has any."""

    def execute(connection: Connection) -> list[list[Any]] | None:
        sets = [tuple(one) for one in statement["parameters"]]
        result = connection.exec_driver_sql(statement["sql"], sets if len(sets) > 1 else sets[0])
        return [list(row) for row in result] if result.returns_rows else None

    return execute


async def record_release(url: str) -> dict[str, list[Statement]]:
    """Runs the scenario on an empty database. Returns the statements of each operation. Those of an operation that only
    reads have the rows that they returned."""
    operations: dict[str, list[Statement]] = {}
    async with SQLStore(url) as store:
        for name, operation in SCENARIO:
            with recording(store) as statements:
                await operation(store)
            if all(statement["sql"].startswith("SELECT") for statement in statements):
                for statement in statements:
                    statement["rows"] = await in_database(url, run(statement))
            operations[name] = statements
    return operations


def dump(operations: dict[str, list[Statement]]) -> str:
    lines = (f"{json.dumps(name)}: {json.dumps(found, default=_hex)}" for name, found in operations.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _hex(value: bytes) -> dict[str, str]:
    return {"hex": value.hex()}


def load(revision: str, dialect: str) -> dict[str, list[Statement]]:
    """Returns the recorded operations of the release whose newest schema revision is `revision`."""

    def value(found: dict[str, Any]) -> Any:
        return bytes.fromhex(found["hex"]) if found.keys() == {"hex"} else found

    return json.loads((FOLDER / f"{revision}.{dialect}.json").read_text(), object_hook=value)


async def _main() -> None:
    from tests.support import postgres

    with postgres.running() as server, tempfile.TemporaryDirectory() as folder:
        for dialect, url in (("sqlite", f"sqlite:///{folder}/db"), ("postgresql", server.new())):
            operations = await record_release(url)
            version = await in_database(
                url, lambda connection: connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            )
            (FOLDER / f"{version}.{dialect}.json").write_text(dump(operations))


if __name__ == "__main__":
    asyncio.run(_main())
