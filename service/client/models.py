"""The values in the service's responses, as frozen models that ignore unknown fields."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

TrajectoryFormat = Literal["steps", "messages", "tokens"]


class Value(BaseModel):
    """Base class. Unknown fields are ignored, because a newer service may send more fields than this client knows."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_temporal="seconds")  # as in the answers

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """The fields that differ from their defaults."""
        fields = type(self).model_fields
        return [(name, value) for name, value in super().__repr_args__() if value != fields[name or ""].default]


class Usage(Value):
    """Numbers of tokens of one act. `cached_tokens` of the prompt tokens came from the prefix cache."""

    prompt_tokens: int = 0
    cached_tokens: int | None = None
    completion_tokens: int = 0


class Timing(Value):
    """Durations of the parts of one act, in seconds."""

    queue_s: float | None = None
    engine_s: float | None = None
    store_s: float | None = None
    total_s: float | None = None


class ParseFailure(Value):
    """Why a completion could not be parsed into an action of the action space."""

    kind: str
    detail: str | None = None


class Act(Value):
    """The response to one observation.

    `action` is None if the episode is `done`, or if the completion could not be parsed (see `parse_failure`).
    `action_probs` maps each legal action of a discrete action space to its probability; with `"probs": "taken"`, only
    the action taken and others that became known on the way. `legal_mass` is the probability of all legal actions
    before the policy was restricted to them.
    """

    episode_id: str
    step: int
    action: Any = None
    text: str | None = None
    reasoning: str | None = None
    action_probs: dict[str, float] | None = None
    legal_mass: float | None = None
    logprob: float | None = None
    finish_reason: str | None = None
    parse_failure: ParseFailure | None = None
    done: bool = False
    replayed: bool = False
    policy_version: str | None = None
    usage: Usage | None = None
    timing: Timing | None = None


class Parent(Value):
    """The episode and the step at which a fork branched off."""

    episode_id: str
    step: int


class EpisodeResource(Value):
    """An episode's fields and state. `step` is the index of the next act."""

    episode_id: str
    status: str
    stop_reason: str | None = None
    success: bool | None = None
    step: int
    episode_return: float = 0.0
    num_tokens: int | None = None
    policy: str | None = None
    policy_updates: str | None = None
    policy_version: str | None = None
    parent: Parent | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    ended_at: datetime | None = None
    instructions: str = ""
    goal: str | None = None
    action_space: dict[str, Any] | None = None
    sampling: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    profile: str | None = None
    reasoning: dict[str, Any] | None = None
    max_steps: int | None = None
    idle_ttl_s: float | None = None
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] | None = None
    group: str | None = None


class Feedback(Value):
    """A stored rating."""

    episode_id: str
    step: int | None = None
    rating: int
    comment: str | None = None
    rater: str | None = None
    created_at: datetime | None = None


class Profile(Value):
    """A preset for opening episodes. `fields` are fields of POST /episode."""

    name: str
    description: str = ""
    fields: dict[str, Any]


class Policy(Value):
    """A name that episodes can be opened with: the base model, or an adapter of it.

    `version` is the version that the name points to (`name@digest`), and `previous` the one that a rollback returns to.
    """

    name: str
    kind: str
    policy_version: str
    base: str | None = None
    rank: int | None = None
    loaded_at: datetime | None = None
    version: str | None = None
    previous: str | None = None


class PolicyVersion(Value):
    """A version of an adapter: `version` is `name@digest`. `current` says whether the name points to it.

    `parent` (another version), `round` and `evaluation` say where it comes from.
    """

    version: str
    name: str
    kind: str = "adapter"
    digest: str
    policy_version: str
    base: str | None = None
    rank: int | None = None
    loaded_at: datetime | None = None
    current: bool
    parent: str | None = None
    round: int | None = None
    evaluation: dict[str, Any] | None = None


class EpisodePage(Value):
    """One page of episodes. Pass `next_cursor` as `cursor` to get the next page."""

    episodes: tuple[EpisodeResource, ...]
    next_cursor: str | None = None
