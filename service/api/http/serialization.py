"""Serializes episodes and trajectories: as a resource, as steps, as chat messages, or as tokens for training."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, groupby
from typing import Any, Literal

from service.agent.options import system_text
from service.engine import supports
from service.engine.prompt import observation_text
from service.settings import policy_name
from service.trajectory import Feedback, JsonValue, Span, Step, StoredEpisode, public_id

Rendered = dict[str, JsonValue]
Rewards = Sequence[float | None]

_RESOURCE_DEFAULTS: dict[str, JsonValue] = {
    "profile": None,
    "instructions": "",
    "goal": None,
    "action_space": {"type": "text"},
    "sampling": {},
    "reasoning": None,
    "context": {"overflow": "slide"},
    "policy_updates": "pinned",
    "max_steps": None,
    "idle_ttl_s": None,
    "tags": [],
    "metadata": {},
    "group": None,
}


def resource(record: StoredEpisode) -> dict[str, JsonValue]:
    """Returns the episode resource, as `schemas.Episode` describes it."""
    config, state = record.config, record.state
    return {
        **_RESOURCE_DEFAULTS,
        **config.request,
        "policy": policy_name(config.request["policy"]),
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


@dataclass(frozen=True, slots=True)
class Window:
    """A page of a trajectory: at most `limit` steps from index `first` on."""

    first: int
    limit: int | None

    @property
    def end(self) -> int | None:
        """The index after the last step of the page; None for the end of the episode."""
        return None if self.limit is None else self.first + self.limit

    def contains(self, index: int) -> bool:
        return self.first <= index and (self.end is None or index < self.end)


def as_steps(record: StoredEpisode, rows: Sequence[Step]) -> Rendered:
    """Returns the steps, each with the reward for its action, and the message that ended the episode, if any."""
    steps = [_step(row, reward) for row, reward in zip(rows, _rewards(rows), strict=True) if not row.closing]
    closing = next((_closing_message(row) for row in rows if row.closing), None)
    return {"steps": steps, "closing": closing}


def as_messages(record: StoredEpisode, rows: Sequence[Step]) -> Rendered:
    """Returns the conversation as chat messages: system, then user (observation) and assistant (action) alternately.

    A thought is in the assistant's `reasoning_content`, the name that the chat templates of reasoning models use.
    """
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
    """Returns the trajectory as segments: runs of steps that share a window. Each list has one entry for each token.

    token_ids: all tokens that the policy received or sampled in the segment.
    loss_mask: 1 for tokens that the policy sampled in this segment's steps, else 0.
    logprobs: log-probability of sampled tokens under the distribution that they were sampled from (at temperature 0:
    under that of temperature 1), else 0.
    support: what a sampled token was sampled among, else null; see `schemas.Segment`.
    recorded_mask: 1 for tokens of actions that somebody else chose, else 0.
    step_starts: for each step, the index of its first token.
    rewards: for each step, the reward for its action, or null.

    A step whose thought is dropped from later windows ends its segment. So does a change of the temperature: the
    default of a policy can change while an episode is active. An encoder-decoder model has one segment for
    each step, with the encoder's input in `encoder_token_ids` and the decoder's tokens in `token_ids`.
    """
    decided = [row for row in rows if not row.closing]
    rewards = _rewards(rows)
    if any(row.span.encoder_token_ids is not None for row in decided):
        return {"segments": [_encoder_decoder_segment(row, rewards, _temperature(record, row)) for row in decided]}
    num_dropped = list(accumulate((row.dropped != (0, 0) for row in decided[:-1]), initial=0))
    keys = [(row.window_start, num, _temperature(record, row)) for row, num in zip(decided, num_dropped, strict=False)]
    groups = groupby(zip(keys, decided, strict=True), key=lambda pair: pair[0])
    return {
        "segments": [
            _segment(decided, rewards, start, temperature, [row for _, row in members])
            for (start, _, temperature), members in groups
        ]
    }


Format = Literal["steps", "messages", "tokens"]
_FORMATS: dict[Format, Callable[[StoredEpisode, Sequence[Step]], Rendered]] = {
    "steps": as_steps,
    "messages": as_messages,
    "tokens": as_tokens,
}


RATED: tuple[Format, ...] = ("steps", "tokens")
"""The formats that have the ratings."""


def document(
    record: StoredEpisode,
    rows: Sequence[Step],
    feedback: Sequence[Feedback],
    format: Format,
    window: Window | None = None,
) -> Rendered:
    """Returns the trajectory in one of its formats. The formats `steps` and `tokens` also have the feedback.

    With `window`, `rows` are the steps of this page and the row after them. The page has the ratings of its steps and
    of the whole episode.
    """
    head = {"episode": resource(record), "format": format}
    if window is None:
        ratings = {"feedback": [rating(item) for item in feedback]} if format in RATED else {}
        return {**head, **_FORMATS[format](record, rows), **ratings}
    next_step = window.end if window.end is not None and window.end < record.state.step else None
    of_page = [item for item in feedback if item.step is None or window.contains(item.step)]
    ratings = {"feedback": [rating(item) for item in of_page]} if format == "steps" else {}
    return {**head, **_page(record, rows, format, window), **ratings, "next_step": next_step}


def _page(record: StoredEpisode, rows: Sequence[Step], format: Format, window: Window) -> Rendered:
    if format == "messages":
        messages = as_messages(record, [row for row in rows if row.closing or window.contains(row.index)])["messages"]
        return {"messages": messages if window.first == 0 else [one for one in messages if one["role"] != "system"]}
    page = as_steps(record, rows)
    return {**page, "steps": [step for step in page["steps"] if window.contains(step["step"])]}


def rating(feedback: Feedback) -> Rendered:
    """Returns a rating, as `schemas.Feedback` describes it."""
    fields = {name: value for name, value in asdict(feedback).items() if name != "idempotency_key"}
    return {**fields, "episode_id": public_id(feedback.episode_id)}


@dataclass(slots=True)
class _Tokens:
    """The lists of a segment, with one entry for each token; in `step_starts`, one for each step."""

    step_starts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    support: list[Rendered | None] = field(default_factory=list)
    recorded_mask: list[int] = field(default_factory=list)

    def add_context(self, row: Step) -> None:
        """Adds the tokens of an earlier step that the segment repeats, without its dropped thought."""
        visible = [*row.span.token_ids[: row.dropped[0]], *row.span.token_ids[row.dropped[1] :]]
        self.token_ids += visible
        self.loss_mask += bytes(len(visible))
        self.logprobs += [0.0] * len(visible)
        self.support += [None] * len(visible)
        self.recorded_mask += bytes(len(visible))

    def add(self, span: Span) -> None:
        """Adds the tokens of a step of the segment."""
        self.step_starts.append(len(self.token_ids))
        self.token_ids += span.token_ids
        self.loss_mask += span.loss_mask
        self.logprobs += span.logprobs
        for num_tokens, kind, ids in supports.runs(supports.support_of(span)):
            self.support += [_support(kind, ids)] * num_tokens
            self.recorded_mask += [int(kind == supports.RECORDED)] * num_tokens

    def rendered(self) -> Rendered:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def _support(kind: int, ids: Sequence[int]) -> Rendered | None:
    if kind == supports.ALL:
        return {"kind": "all"}
    if kind == supports.FILTERED:
        return {"kind": "filtered"}
    return {"kind": "ids", "ids": list(ids)} if ids else None


def _temperature(record: StoredEpisode, row: Step) -> float:
    """Returns the temperature that the stored log-probabilities of a step have: 1 where 0 was asked for."""
    sampling: Rendered = record.config.request.get("sampling") or {}  # steps of older versions lack the temperature
    return (sampling.get("temperature") if row.temperature is None else row.temperature) or 1.0


def _rewards(rows: Sequence[Step]) -> list[float | None]:
    """Returns the reward for the action of each row, which the message of the next row has."""
    return [row.message.reward for row in rows[1:]] + [None] if rows else []


def _segment(
    rows: Sequence[Step], rewards: Rewards, start: int, temperature: float, members: Sequence[Step]
) -> Rendered:
    first = members[0].index
    tokens = _Tokens()
    for row in rows[:first]:
        if row.index == 0 or row.index >= start:
            tokens.add_context(row)
    for row in members:
        tokens.add(row.span)
    return {**_head(members, rewards, start, temperature), **tokens.rendered()}


def _encoder_decoder_segment(row: Step, rewards: Rewards, temperature: float) -> Rendered:
    tokens = _Tokens()
    tokens.add(row.span)
    given = list(row.span.encoder_token_ids or ())
    return {**_head([row], rewards, row.window_start, temperature), "encoder_token_ids": given, **tokens.rendered()}


def _head(members: Sequence[Step], rewards: Rewards, start: int, temperature: float) -> Rendered:
    return {
        "steps": [row.index for row in members],
        "rewards": [rewards[row.index] for row in members],
        "window_start": start,
        "policy_versions": [row.answer["policy_version"] for row in members],
        "temperature": temperature,
    }


def _step(row: Step, reward: float | None) -> dict[str, Any]:
    answer = row.answer
    copied = (
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
    given = {"step": row.index, "observation": row.message.observation, "info": row.message.info}
    legal = row.message.legal_actions
    decided = {name: answer[name] for name in copied}
    decided["legal_mass"] = answer.get("legal_mass")  # steps of older versions lack it
    return {**given, "legal_actions": legal, **decided, "reward": reward, "created_at": row.created_at}


def _closing_message(row: Step) -> dict[str, Any]:
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
