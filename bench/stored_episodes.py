"""Generates stored episodes by SQL, which is faster than playing them.

Most labels are common, and some occur once in a thousand episodes, so that a filter has to find few among many.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, make_url

from service.store import schema
from service.store.connections import Connections, Patience
from service.store.postgresql import PostgreSQLConnections
from service.store.sqlite import SQLiteConnections

RARE = 1_000
"""One of this number of episodes has the rare labels."""

_CHUNK = 2_000
"""Episodes that are generated in one transaction."""
_NUM_TOKENS = 14
"""Tokens of a step."""
_PATIENCE = Patience(lock_s=600.0, transaction_s=3600.0)

_REQUEST = (
    '{"profile":null,"instructions":"Reach the goal. Answer with one action.","goal":null,"action_space":{"type":'
    '"discrete","actions":["left","down","right","up"],"probs":null},"sampling":{"temperature":0.0},"reasoning":null,'
    '"context":{"overflow":"slide","max_tokens":null},"policy":"base","max_steps":null,"idle_ttl_s":null,"tags":[],'
    '"metadata":{"env":"lake","seed":7},"group":null}'
)
_MESSAGE = """{"observation":"row 2, column 2","reward":0.0}"""
_ANSWER = (
    '{"episode_id":"e000000000","step":10,"action":"right","text":"right","reasoning":null,"action_probs":'
    '{"left":0.01,"down":0.02,"right":0.96,"up":0.01},"legal_mass":0.999,"logprob":-0.04,"finish_reason":"stop",'
    '"parse_failure":null,"done":false,"policy_version":"83932aeeb889","usage":{"prompt_tokens":212,"cached_tokens":'
    '192,"completion_tokens":2}}'
)


def name(number: int) -> str:
    """The id of a generated episode."""
    return f"e{number:09d}"


async def in_database(url: str, function: Callable[[Connection], Any]) -> Any:
    """Runs a function in a transaction of a store that has been opened before."""
    kind = SQLiteConnections if url.startswith("sqlite") else PostgreSQLConnections
    connections: Connections = kind(make_url(url), _PATIENCE)
    try:
        return await connections.write(function)
    finally:
        await connections.close()


async def fill(url: str, first: int, end: int, length: int) -> None:
    """Adds the episodes first:end, each with `length` steps. They were created at second 0, 1, ..."""
    for start in range(first, end, _CHUNK):
        stop = min(start + _CHUNK, end)
        await in_database(url, lambda connection, start=start, stop=stop: _insert(connection, start, stop, length))


def _insert(connection: Connection, first: int, end: int, length: int) -> None:
    sql = _SQLite if connection.dialect.name == "sqlite" else _PostgreSQL
    is_active = f"i % {RARE} = {RARE // 2}"
    episodes = {
        **{"episode_id": sql.name, "created_at": "i", "step": str(length), "tenant": "'default'"},
        **{"status": f"CASE WHEN {is_active} THEN 'active' ELSE 'ended' END"},
        **{"stop_reason": f"CASE WHEN {is_active} THEN NULL ELSE 'terminated' END", "updated_at": "i"},
        **{"ended_at": f"CASE WHEN {is_active} THEN NULL ELSE i END"},
        **{"expires_at": f"CASE WHEN {is_active} THEN i + 1e9 END"},
        **{"request": f"'{_REQUEST}'", "digest": sql.blob(16), "policy_version": "'v'", "success": "i % 2"},
        **{"episode_return": "(CAST(i AS bigint) * 7919) % 1000", "num_tokens": str(length * _NUM_TOKENS)},
        **{"label_version": "1", "env": _rare("lake"), "policy": _rare("base"), "profile": _rare("plain")},
        **{"episode_group": "'g' || (i / 8)", "seed": "CAST(i % 1000 AS text)"},
        **{"num_parse_failures": "CASE WHEN i % 50 = 0 THEN 1 ELSE 0 END", "num_recorded": "0"},
    }
    steps = {
        **{"episode_id": sql.name, "step": "s", "message": f"'{_MESSAGE}'", "closing": "0", "answer": f"'{_ANSWER}'"},
        **{"token_ids": sql.blob(4 * _NUM_TOKENS), "loss_mask": sql.blob(_NUM_TOKENS)},
        **{"logprobs": sql.blob(4 * _NUM_TOKENS), "digest": sql.blob(16), "window_start": "1", "created_at": "i"},
        **{"temperature": "0", "seconds": "0.001 * (1 + (i + s) % 7)"},
    }
    ratings = {"episode_id": sql.name, "rating": "1 + i % 5", "created_at": "i"}
    numbers = sql.series("i", first, end)
    rows: list[tuple[str, dict[str, str], str]] = [
        ("episodes", episodes, numbers),
        ("steps", steps, f"{numbers} CROSS JOIN {sql.series('s', 0, length)}"),
        (schema.tags.name, {"episode_id": sql.name, "tag": "'run'"}, numbers),
        (schema.tags.name, {"episode_id": sql.name, "tag": "'t' || (i % 1000)"}, numbers),
        (schema.entries.name, {"episode_id": sql.name, "name": "'env'", "value": _rare("lake")}, numbers),
        (schema.entries.name, {"episode_id": sql.name, "name": "'seed'", "value": "CAST(i % 1000 AS text)"}, numbers),
        (schema.ratings.name, ratings, f"{numbers} WHERE i % 100 = 0"),
    ]
    for table, row, source in rows:
        insert = f"INSERT INTO {table} ({', '.join(row)}) SELECT {', '.join(row.values())} FROM {source}"  # noqa: S608
        connection.exec_driver_sql(insert)


def _rare(common: str) -> str:
    return f"CASE WHEN i % {RARE} = 0 THEN 'rare' ELSE '{common}' END"


class _SQLite:
    name = "printf('e%09d', i)"

    @staticmethod
    def series(name: str, low: int, high: int) -> str:
        more = f"SELECT {name} + 1 FROM n WHERE {name} < {high - 1}"  # noqa: S608
        return f"(WITH RECURSIVE n({name}) AS (SELECT {low} UNION ALL {more}) SELECT {name} FROM n)"  # noqa: S608

    @staticmethod
    def blob(size: int) -> str:
        return f"zeroblob({size})"


class _PostgreSQL:
    name = "'e' || lpad(CAST(i AS text), 9, '0')"

    @staticmethod
    def series(name: str, low: int, high: int) -> str:
        return f"(SELECT generate_series({low}, {high - 1}) AS {name}) AS {name}_series"

    @staticmethod
    def blob(size: int) -> str:
        return f"decode(repeat('00', {size}), 'hex')"
