"""The tables of the SQL store, and the conversion between values and rows. JSON is stored as text, and token ids and
logprobs as packed arrays.
"""

import dataclasses
from array import array
from typing import Any

from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, RowMapping, String, Table, Text, text

from service.filters import LABELS, MAX_KEY, MAX_TEXT, labels_of, metadata_of
from service.trajectory import (
    DEFAULT_TENANT,
    EpisodeConfig,
    EpisodeState,
    Feedback,
    JsonValue,
    Message,
    Span,
    Step,
    StopReason,
    StoredEpisode,
    StoredKey,
    StoredVersion,
)
from service.validation import strict_json

metadata = MetaData()

_Id = String(200)  # TENANT:EPISODE, up to 64 and 128 characters
_ACTIVE = text("status = 'active'")
_KEPT = text("deleted_at IS NULL AND ended_at IS NOT NULL")
_GONE = text("deleted_at IS NOT NULL")
_NEWEST = ("created_at", "episode_id")
_INDEXED_LABELS = {"env": "env", "group": "episode_group", "policy": "policy", "profile": "profile"}

LABEL_VERSION = 1
"""Stored with each episode whose labels and metadata are in columns and rows of their own."""
UNLABELLED = text("(label_version IS NULL) = (deleted_at IS NULL)")
"""Selects the episodes that an older version wrote, without these labels, and the tombstones that still have some."""

episodes = Table(
    "episodes",
    metadata,
    Column("episode_id", _Id, primary_key=True),
    Column("request", Text, nullable=False),
    Column("digest", LargeBinary(16), nullable=False),
    Column("policy_version", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("step", Integer, nullable=False),
    Column("status", String(8), nullable=False),
    Column("stop_reason", String(32)),
    Column("success", Integer),
    Column("episode_return", Float(53), nullable=False),
    Column("num_tokens", Integer, nullable=False),
    Column("updated_at", Float(53), nullable=False),
    Column("ended_at", Float(53)),
    Column("deleted_at", Float(53)),
    Column("policy", Text),
    Column("profile", String(128)),
    Column("episode_group", String(128)),
    Column("parent_id", _Id),
    Column("parent_step", Integer),
    Column("expires_at", Float(53)),
    Column("tenant", String(64), nullable=False, server_default=DEFAULT_TENANT),
    Column("env", String(MAX_TEXT)),
    Column("seed", String(MAX_TEXT)),
    Column("label_version", Integer),
    Column("num_parse_failures", Integer),
    Column("num_recorded", Integer),
    Column("policy_digest", String(64)),
    Index("ix_episodes_created", *_NEWEST),
    Index("ix_episodes_expires", "expires_at"),
    Index("ix_episodes_tenant", "tenant", *_NEWEST),
    *(Index(f"ix_episodes_tenant_{name}", "tenant", column, *_NEWEST) for name, column in _INDEXED_LABELS.items()),
    Index("ix_episodes_tenant_active", "tenant", *_NEWEST, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE),
    Index("ix_episodes_unlabelled", "episode_id", sqlite_where=UNLABELLED, postgresql_where=UNLABELLED),
    Index("ix_episodes_ended", "ended_at", sqlite_where=_KEPT, postgresql_where=_KEPT),
    Index("ix_episodes_deleted", "deleted_at", sqlite_where=_GONE, postgresql_where=_GONE),
)

tags = Table(
    "episode_tags",
    metadata,
    Column("tag", String(128), primary_key=True),
    Column("episode_id", _Id, primary_key=True),
    Index("ix_episode_tags_episode", "episode_id"),
)

# The metadata of an episode, to filter by: strings, and the JSON text of numbers, booleans and null.
entries = Table(
    "episode_metadata",
    metadata,
    Column("name", String(MAX_KEY), primary_key=True),
    Column("value", String(MAX_TEXT), primary_key=True),
    Column("episode_id", _Id, primary_key=True),
    Index("ix_episode_metadata_episode", "episode_id"),
)

# The steps that a fork shares: of each ancestor, the steps stored under its id with an index below num_steps.
ancestors = Table(
    "ancestors",
    metadata,
    Column("episode_id", _Id, primary_key=True),
    Column("ancestor_id", _Id, primary_key=True),
    Column("num_steps", Integer, nullable=False),
    Index("ix_ancestors_ancestor", "ancestor_id"),
)

ratings = Table(
    "feedback",
    metadata,
    Column("feedback_id", Integer, primary_key=True),
    Column("episode_id", _Id, nullable=False),
    Column("step", Integer),
    Column("rating", Integer, nullable=False),
    Column("comment", Text),
    Column("rater", String(128)),
    Column("created_at", Float(53), nullable=False),
    Column("idempotency_key", String(255)),
    Index("ix_feedback_episode", "episode_id"),
)

steps = Table(
    "steps",
    metadata,
    Column("episode_id", _Id, primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("message", Text, nullable=False),
    Column("closing", Integer, nullable=False),
    Column("token_ids", LargeBinary, nullable=False),
    Column("loss_mask", LargeBinary, nullable=False),
    Column("logprobs", LargeBinary, nullable=False),
    Column("window_start", Integer, nullable=False),
    Column("answer", Text, nullable=False),
    Column("digest", LargeBinary(16), nullable=False),
    Column("idempotency_key", String(255)),
    Column("created_at", Float(53), nullable=False),
    Column("dropped_from", Integer, nullable=False, server_default="0"),
    Column("dropped_to", Integer, nullable=False, server_default="0"),
    Column("encoder_token_ids", LargeBinary),
    Column("support", LargeBinary),
    Column("temperature", Float(53)),
    Column("seconds", Float(53)),
)

# The aliases: each is a copy of the version that it points to. Older replicas know only this table, so an alias may
# point to a version that has no row in `versions`.
aliases = Table(
    "policies",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("version", String(64), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("loaded_at", Float(53), nullable=False),
)

versions = Table(
    "policy_versions",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("version", String(64), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("loaded_at", Float(53), nullable=False),
    Column("parent", String(160)),
    Column("round", Integer),
    Column("evaluation", Text),
)

# The versions that each alias pointed to, in order. The last one is the current one.
moves = Table(
    "policy_moves",
    metadata,
    Column("move_id", Integer, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("moved_at", Float(53), nullable=False),
    Index("ix_policy_moves_name", "name", "move_id"),
)

# At most one row: the policy of new episodes that name none.
defaults = Table(
    "policy_default",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("policy", String(160), nullable=False),
)

keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("revoked_at", Float(53)),
)

_TEXTS = {
    table.name: [(column.name, column.type.length) for column in table.columns if isinstance(column.type, String)]
    for table in metadata.tables.values()
}
_MESSAGE_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Message)}


def dump(value: JsonValue) -> str:
    """Serializes a value as compact JSON. Control characters are escaped, NUL included."""
    return strict_json.write(value).decode()


def storable(value: str) -> bool:
    """Whether every database can store the text. PostgreSQL rejects NUL, and a lone surrogate has no UTF-8 encoding."""
    return "\0" not in value and (value.isascii() or not any("\ud800" <= one <= "\udfff" for one in value))


def checked(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row unchanged. Raises ValueError for a text that some database cannot store. In PostgreSQL an error
    in one row would abort the whole transaction."""
    for name, length in _TEXTS[table.name]:
        value = row.get(name)
        if value is None:
            continue
        if not storable(value):
            raise ValueError(f"{name} contains a character that cannot be stored (NUL or a lone surrogate)")
        if length is not None and len(value) > length:
            raise ValueError(f"{name} has {len(value)} characters; at most {length} are allowed")
    return row


def episode_row(record: StoredEpisode) -> dict[str, Any]:
    """Converts an episode to a row. Like the other *_row functions, raises ValueError or TypeError for a value that
    cannot be stored."""
    config = record.config
    row = {
        "episode_id": config.episode_id,
        "tenant": config.tenant,
        "request": dump(config.request),
        "digest": config.digest,
        "policy_version": config.policy_version,
        "created_at": config.created_at,
        **labels(config.request),
        "label_version": LABEL_VERSION,
        "parent_id": config.parent and config.parent[0],
        "parent_step": config.parent and config.parent[1],
        "policy_digest": config.policy_digest,
        **state_row(record.state),
    }
    return checked(episodes, row)


LABEL_COLUMNS: dict[str, Column[Any]] = {
    name: episodes.c.episode_group if name == "group" else episodes.c[name]
    for name in (*LABELS, "seed")  # GROUP is a reserved word of SQL
}
"""The column of each label: those to filter by, and the seed."""


def labels(request: dict[str, JsonValue]) -> dict[str, str | None]:
    """Returns the labels of a request by column name."""
    return {LABEL_COLUMNS[name].name: value for name, value in labels_of(request).items()}


def tag_rows(record: StoredEpisode) -> list[dict[str, str]]:
    episode_id = record.config.episode_id
    unique = dict.fromkeys(record.config.request.get("tags", ()))
    return [checked(tags, {"episode_id": episode_id, "tag": tag}) for tag in unique]


def entry_rows(episode_id: str, request: dict[str, JsonValue]) -> list[dict[str, str]]:
    """Returns the rows of the metadata to filter by."""
    return [{"episode_id": episode_id, "name": name, "value": value} for name, value in metadata_of(request).items()]


def state_row(state: EpisodeState) -> dict[str, Any]:
    return {
        "step": state.step,
        "status": state.status,
        "stop_reason": state.stop_reason,
        "success": None if state.success is None else int(state.success),
        "episode_return": state.episode_return,
        "num_tokens": state.num_tokens,
        "num_parse_failures": state.num_parse_failures,
        "num_recorded": state.num_recorded,
        "updated_at": state.updated_at,
        "ended_at": state.ended_at,
        "expires_at": state.expires_at,
    }


def episode_record(row: RowMapping, rating: float | None = None) -> StoredEpisode:
    config = EpisodeConfig(
        episode_id=row["episode_id"],
        request=strict_json.load(row["request"]),
        digest=row["digest"],
        policy_version=row["policy_version"],
        created_at=row["created_at"],
        parent=None if row["parent_id"] is None else (row["parent_id"], row["parent_step"]),
        policy_digest=row["policy_digest"],
    )
    state = EpisodeState(
        step=row["step"],
        status=row["status"],
        stop_reason=StopReason(row["stop_reason"]) if row["stop_reason"] else None,
        success=None if row["success"] is None else bool(row["success"]),
        episode_return=row["episode_return"],
        num_tokens=row["num_tokens"],
        num_parse_failures=row["num_parse_failures"],
        num_recorded=row["num_recorded"],
        updated_at=row["updated_at"],
        ended_at=row["ended_at"],
        expires_at=row["expires_at"],
    )
    return StoredEpisode(config, state, row["deleted_at"] is not None, rating)


def step_row(step: Step) -> dict[str, Any]:
    encoder_ids = step.span.encoder_token_ids
    message = {name: getattr(step.message, name) for name in _MESSAGE_DEFAULTS}
    row = {
        "episode_id": step.episode_id,
        "step": step.index,
        "message": dump({name: value for name, value in message.items() if value != _MESSAGE_DEFAULTS[name]}),
        "closing": int(step.closing),
        "token_ids": step.span.token_ids.tobytes(),
        "loss_mask": step.span.loss_mask,
        "logprobs": step.span.logprobs.tobytes(),
        "window_start": step.window_start,
        "answer": dump(step.answer),
        "digest": step.digest,
        "idempotency_key": step.idempotency_key,
        "created_at": step.created_at,
        "dropped_from": step.dropped[0],
        "dropped_to": step.dropped[1],
        "encoder_token_ids": None if encoder_ids is None else encoder_ids.tobytes(),
        "support": step.span.support.tobytes() or None,
        "temperature": step.temperature,
        "seconds": step.seconds,
    }
    return checked(steps, row)


def step_value(row: RowMapping) -> Step:
    message = strict_json.load(row["message"])
    if message.get("legal_actions") is not None:
        message["legal_actions"] = tuple(message["legal_actions"])
    return Step(
        episode_id=row["episode_id"],
        index=row["step"],
        message=Message(**message),
        closing=bool(row["closing"]),
        span=_span(row),
        window_start=row["window_start"],
        answer=strict_json.load(row["answer"]),
        digest=row["digest"],
        created_at=row["created_at"],
        idempotency_key=row["idempotency_key"],
        dropped=(row["dropped_from"], row["dropped_to"]),
        temperature=row["temperature"],
        seconds=row["seconds"],
    )


def _span(row: RowMapping) -> Span:
    encoder_ids = row["encoder_token_ids"]
    return Span(
        array("i", row["token_ids"]),
        row["loss_mask"],
        array("f", row["logprobs"]),
        None if encoder_ids is None else array("i", encoder_ids),
        array("i", row["support"] or b""),
    )


def feedback_value(row: RowMapping) -> Feedback:
    return Feedback(**{field.name: row[field.name] for field in dataclasses.fields(Feedback)})


def feedback_row(feedback: Feedback) -> dict[str, Any]:
    return checked(ratings, dataclasses.asdict(feedback))


def version_row(version: StoredVersion) -> dict[str, Any]:
    return checked(versions, dataclasses.asdict(version))


def alias_row(version: StoredVersion) -> dict[str, Any]:
    """Returns the row of an alias that points to this version."""
    row = version_row(version)
    return {column.name: row[column.name] for column in aliases.columns}


def key_row(key: StoredKey) -> dict[str, Any]:
    return checked(keys, {**dataclasses.asdict(key), "scopes": " ".join(key.scopes)})


def key_record(row: RowMapping) -> StoredKey:
    fields: dict[str, Any] = {**row, "scopes": tuple(row["scopes"].split())}
    return StoredKey(**fields)
