"""Serialization: an episode as a resource; a trajectory as steps, chat messages, or tokens."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate, groupby
from typing import Any, Literal

from service.agent.options import system_text
from service.engine.prompt import observation_text
from service.trajectory import Feedback, JsonValue, Step, StoredEpisode, public_id

Rendered = dict[str, JsonValue]

_RESOURCE_DEFAULTS: dict[str, JsonValue] = {
    "profile": None,
    "instructions": "",
    "goal": None,
    "action_space": {"type": "text"},
    "sampling": {},
    "reasoning": None,
    "context": {"overflow": "slide"},
    "max_steps": None,
    "idle_ttl_s": None,
    "tags": [],
    "metadata": {},
    "group": None,
}


def resource(record: StoredEpisode) -> dict[str, JsonValue]:
    """The episode resource of the HTTP contract."""
    config, state = record.config, record.state
    return {
        **_RESOURCE_DEFAULTS,
        **config.request,
        "episode_id": public_id(config.episode_id),
        "status": state.status,
        "stop_reason": state.stop_reason,
        "success": state.success,
        "step": state.step,
        "episode_return": state.episode_return,
        "num_tokens": state.num_tokens,
        "policy_version": config.policy_version,
        "parent": config.parent and {"episode_id": public_id(config.parent[0]), "step": config.parent[1]},
        "created_at": config.created_at,
        "updated_at": state.updated_at,
        "ended_at": state.ended_at,
    }


def as_steps(record: StoredEpisode, rows: Sequence[Step]) -> Rendered:
    """Steps with the reward that came for each one's action, and the message that closed the episode, if any."""
    rewards = [row.message.reward for row in rows[1:]] + [None]
    steps = [_step(row, reward) for row, reward in zip(rows, rewards, strict=True) if not row.closing] if rows else []
    closing = next((_said(row) for row in rows if row.closing), None)
    return {"steps": steps, "closing": closing}


def as_messages(record: StoredEpisode, rows: Sequence[Step]) -> Rendered:
    """The conversation as chat messages: system, then user (observation) and assistant (action) in turns; a thought is
    the assistant's `reasoning_content`, as the chat templates of models that think name it."""
    system = system_text(record.config.request)
    messages = [{"role": "system", "content": system}] if system else []
    for row in rows:
        if row.message.observation is not None:
            messages.append({"role": "user", "content": observation_text(row.message.observation)})
        if row.closing:
            continue
        thought = row.answer["reasoning"]
        thinking = {} if thought is None else {"reasoning_content": thought}
        messages.append({"role": "assistant", **thinking, "content": row.answer["text"]})
    return {"messages": messages}


def as_tokens(record: StoredEpisode, rows: Sequence[Step]) -> Rendered:
    """Segments of steps that share a window. A step whose thought later steps do not see ends its segment.

    token_ids: all that the policy saw and drew in the segment. loss_mask: 1 if it drew the token in one of the
    segment's own steps. logprobs: those of the drawn tokens, else 0. An encoder-decoder model has one segment for each
    step, with `encoder_token_ids` beside the decoder's `token_ids`.
    """
    decided = [row for row in rows if not row.closing]
    if any(row.span.encoder_token_ids is not None for row in decided):
        return {"segments": [_encoder_decoder_segment(row) for row in decided]}
    hiding = list(accumulate((row.dropped != (0, 0) for row in decided[:-1]), initial=0))
    groups = groupby(zip(decided, hiding, strict=False), key=lambda pair: (pair[0].window_start, pair[1]))
    return {"segments": [_segment(decided, key[0], [row for row, _ in members]) for key, members in groups]}


Format = Literal["steps", "messages", "tokens"]
_FORMATS: dict[Format, Callable[[StoredEpisode, Sequence[Step]], Rendered]] = {
    "steps": as_steps,
    "messages": as_messages,
    "tokens": as_tokens,
}


def document(record: StoredEpisode, rows: Sequence[Step], feedback: Sequence[Feedback], format: Format) -> Rendered:
    """The trajectory in one of its faces; what people said of it goes with its steps."""
    said = {"feedback": [rating(item) for item in feedback]} if format == "steps" else {}
    return {"episode": resource(record), "format": format, **_FORMATS[format](record, rows), **said}


def rating(feedback: Feedback) -> Rendered:
    return {**asdict(feedback), "episode_id": public_id(feedback.episode_id)}


def _segment(rows: Sequence[Step], start: int, members: Sequence[Step]) -> Rendered:
    first = members[0].index
    seen = [row for row in rows[:first] if row.index == 0 or row.index >= start]
    token_ids: list[int] = []
    loss_mask: list[int] = []
    logprobs: list[float] = []
    for row in seen:
        left = [*row.span.token_ids[: row.dropped[0]], *row.span.token_ids[row.dropped[1] :]]
        token_ids += left
        loss_mask += bytes(len(left))
        logprobs += [0.0] * len(left)
    for row in members:
        token_ids += row.span.token_ids
        loss_mask += row.span.loss_mask
        logprobs += row.span.logprobs
    return {
        "steps": [row.index for row in members],
        "window_start": start,
        "policy_versions": [row.answer["policy_version"] for row in members],
        "token_ids": token_ids,
        "loss_mask": loss_mask,
        "logprobs": logprobs,
    }


def _encoder_decoder_segment(row: Step) -> Rendered:
    return {
        "steps": [row.index],
        "window_start": row.window_start,
        "policy_versions": [row.answer["policy_version"]],
        "encoder_token_ids": list(row.span.encoder_token_ids or ()),
        "token_ids": list(row.span.token_ids),
        "loss_mask": list(row.span.loss_mask),
        "logprobs": list(row.span.logprobs),
    }


def _step(row: Step, reward: float | None) -> dict[str, Any]:
    answer = row.answer
    taken = (
        "action",
        "text",
        "reasoning",
        "action_probs",
        "logprob",
        "finish_reason",
        "parse_failure",
        "policy_version",
        "usage",
    )
    said = {"step": row.index, "observation": row.message.observation, "info": row.message.info}
    legal = row.message.legal_actions
    decided = {name: answer[name] for name in taken}
    return {**said, "legal_actions": legal, **decided, "reward": reward, "created_at": row.created_at}


def _said(row: Step) -> dict[str, Any]:
    message = row.message
    return {
        "step": row.index,
        "observation": message.observation,
        "reward": message.reward,
        "terminated": message.terminated,
        "truncated": message.truncated,
        "success": message.success,
        "info": message.info,
    }
