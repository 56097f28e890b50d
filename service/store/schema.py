"""Owns the tables, and the way a frozen value becomes a row and back. JSON is kept as text, tokens as packed arrays."""

import dataclasses
from array import array
from typing import Any

import orjson
from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, RowMapping, String, Table, Text

from service.trajectory import (
    EpisodeConfig,
    EpisodeHead,
    EpisodeRecord,
    JsonValue,
    Message,
    Span,
    Step,
    StopReason,
)

metadata = MetaData()

episodes = Table(
    "episodes",
    metadata,
    Column("episode_id", String(128), primary_key=True),
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
    Index("ix_episodes_created", "created_at", "episode_id"),
)

steps = Table(
    "steps",
    metadata,
    Column("episode_id", String(128), primary_key=True),
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
)

_MESSAGE_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Message)}


def dump(value: JsonValue) -> str:
    """Compact JSON text; control characters, NUL included, are escaped in it."""
    return orjson.dumps(value).decode()


def episode_row(record: EpisodeRecord) -> dict[str, Any]:
    config = record.config
    return {
        "episode_id": config.episode_id,
        "request": dump(config.request),
        "digest": config.digest,
        "policy_version": config.policy_version,
        "created_at": config.created_at,
        **head_row(record.head),
    }


def head_row(head: EpisodeHead) -> dict[str, Any]:
    return {
        "step": head.step,
        "status": head.status,
        "stop_reason": head.stop_reason,
        "success": None if head.success is None else int(head.success),
        "episode_return": head.episode_return,
        "num_tokens": head.num_tokens,
        "updated_at": head.updated_at,
        "ended_at": head.ended_at,
    }


def episode_record(row: RowMapping) -> EpisodeRecord:
    config = EpisodeConfig(
        row["episode_id"], orjson.loads(row["request"]), row["digest"], row["policy_version"], row["created_at"]
    )
    head = EpisodeHead(
        step=row["step"],
        status=row["status"],
        stop_reason=StopReason(row["stop_reason"]) if row["stop_reason"] else None,
        success=None if row["success"] is None else bool(row["success"]),
        episode_return=row["episode_return"],
        num_tokens=row["num_tokens"],
        updated_at=row["updated_at"],
        ended_at=row["ended_at"],
    )
    return EpisodeRecord(config, head, deleted=row["deleted_at"] is not None)


def step_row(step: Step) -> dict[str, Any]:
    said = {name: getattr(step.message, name) for name in _MESSAGE_DEFAULTS}
    return {
        "episode_id": step.episode_id,
        "step": step.index,
        "message": dump({name: value for name, value in said.items() if value != _MESSAGE_DEFAULTS[name]}),
        "closing": int(step.closing),
        "token_ids": step.span.token_ids.tobytes(),
        "loss_mask": step.span.loss_mask,
        "logprobs": step.span.logprobs.tobytes(),
        "window_start": step.window_start,
        "answer": dump(step.answer),
        "digest": step.digest,
        "idempotency_key": step.idempotency_key,
        "created_at": step.created_at,
    }


def step_value(row: RowMapping) -> Step:
    said = orjson.loads(row["message"])
    if said.get("legal_actions") is not None:
        said["legal_actions"] = tuple(said["legal_actions"])
    return Step(
        episode_id=row["episode_id"],
        index=row["step"],
        message=Message(**said),
        closing=bool(row["closing"]),
        span=Span(array("i", row["token_ids"]), row["loss_mask"], array("f", row["logprobs"])),
        window_start=row["window_start"],
        answer=orjson.loads(row["answer"]),
        digest=row["digest"],
        created_at=row["created_at"],
        idempotency_key=row["idempotency_key"],
    )
