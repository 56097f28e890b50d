"""Owns the frozen values of a trajectory: what an episode was opened with, what a step holds, how an episode ends."""

from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

JsonValue = Any
Status = Literal["active", "ended"]
Overflow = Literal["slide", "error", "end"]

DEFAULT_TENANT = "default"
"""Whose the episodes are where no API key says otherwise."""


def qualified(tenant: str, episode_id: str) -> str:
    """The id that is unique among all tenants: each names its episodes without knowing of the others'. A colon is in
    neither part; the default tenant's ids stand as they are."""
    return episode_id if tenant == DEFAULT_TENANT else f"{tenant}:{episode_id}"


def public_id(episode_id: str) -> str:
    """A qualified id as its tenant knows it."""
    return episode_id.rpartition(":")[2]


class StopReason(StrEnum):
    """Why an episode ended. `terminated` and `truncated` have Gymnasium's meaning."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"
    MAX_STEPS = "max_steps"
    IDLE_TTL = "idle_ttl"
    CONTEXT_OVERFLOW = "context_overflow"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next action is drawn from the policy. `temperature` 0 takes the most likely one.

    `seed` makes a step reproducible: each step draws from a generator seeded by (seed, step).
    For discrete actions top_k, top_p and min_p filter the distribution over actions, not over tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Not a caller's: what ends a thought."""


@dataclass(frozen=True, slots=True)
class ParseFailure:
    """Why a completion gave no action. `kind`: "length" (cut by max_tokens), "json" or "schema"."""

    kind: Literal["length", "json", "schema"]
    detail: str


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens that one step added: exactly what the engine was given and drew.

    token_ids: int32 ids. Of a decoder-only model the new turn and then the completion, so that the spans of a window
    form its context; of an encoder-decoder model the decoder's ids, from the start token on.
    loss_mask: one byte for each token, 1 if the policy had a choice and drew it.
    logprobs: float32 for each token: of a drawn one under the distribution that it was drawn from, else 0.
    encoder_token_ids: int32 ids that the encoder was given; None for a decoder-only model.
    """

    token_ids: "array[int]"
    loss_mask: bytes
    logprobs: "array[float]"
    encoder_token_ids: "array[int] | None" = None


EMPTY_SPAN = Span(array("i"), b"", array("f"))


@dataclass(frozen=True, slots=True)
class Message:
    """What a caller says in one act: the observation, and what its environment gave for the previous action."""

    observation: JsonValue = None
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    info: dict[str, JsonValue] | None = None
    legal_actions: tuple[str, ...] | None = None

    @property
    def ends(self) -> StopReason | None:
        """The reason this message ends the episode for, if it does; `terminated` wins over `truncated`."""
        if self.terminated:
            return StopReason.TERMINATED
        return StopReason.TRUNCATED if self.truncated else None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one act: the whole prompt, how many of those the prefix cache held, and the completion."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy decided, and the tokens to store for it.

    span: what the step adds to the episode. window_start: the first step behind step 0 that the policy saw.
    logprob: of the action under the distribution that it was drawn from; None if the policy did not choose it.
    dropped: the range of the span that later windows leave out, because the episode does not keep thoughts.
    """

    action: JsonValue
    text: str
    span: Span
    window_start: int
    policy_version: str
    logprob: float | None
    finish_reason: str
    usage: Usage
    action_probs: dict[str, float] | None = None
    parse_failure: ParseFailure | None = None
    reasoning: str | None = None
    dropped: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Step:
    """One row of an episode: observation -> action, or (`closing`) the message that ended it, which has no action.

    `reward` is what the message brought: the reward for the previous action. `window_start` is the first step behind
    step 0 that the policy saw. `answer` is what POST /act answered, without `replayed` and `timing`.
    """

    episode_id: str
    index: int
    message: Message
    closing: bool
    span: Span
    window_start: int
    answer: dict[str, JsonValue]
    digest: bytes
    created_at: float
    idempotency_key: str | None = None
    dropped: tuple[int, int] = (0, 0)
    """The range of the span that later windows leave out: a thought that is not kept."""


@dataclass(frozen=True, slots=True)
class EpisodeConfig:
    """What POST /episode asked for, a profile's fields among it; `request` is the body that GET /episode/{id} repeats.
    `parent` of a fork: the episode it branched off, and the index of its own first step. `episode_id` is qualified by
    the tenant, here and everywhere below the API."""

    episode_id: str
    request: dict[str, JsonValue]
    digest: bytes
    policy_version: str
    created_at: float
    parent: tuple[str, int] | None = None

    @property
    def tenant(self) -> str:
        return self.episode_id.rpartition(":")[0] or DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class EpisodeState:
    """The part of an episode that changes with each committed step. Times are Unix seconds."""

    step: int = 0
    status: Status = "active"
    stop_reason: StopReason | None = None
    success: bool | None = None
    episode_return: float = 0.0
    num_tokens: int = 0
    updated_at: float = 0.0
    ended_at: float | None = None
    expires_at: float | None = None
    """When it ends unless an act comes first; None for never."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """A human's rating, 1 to 5, of a step or (`step` None) of the episode. A rater has one for each."""

    episode_id: str
    step: int | None
    rating: int
    comment: str | None
    rater: str | None
    created_at: float


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """An adapter that is served: `digest` names its files, `version` the weights that act, base model included."""

    name: str
    digest: str
    version: str
    rank: int
    loaded_at: float


@dataclass(frozen=True, slots=True)
class StoredKey:
    """An API key as it is stored: its SHA-256 digest, its tenant and its scopes. `key_id` is its public part. A revoked
    key stays stored, so that an id in the log can be traced to its tenant."""

    key_id: str
    digest: bytes
    tenant: str
    scopes: tuple[str, ...]
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class StoredEpisode:
    """An episode as it is stored, without its steps; `deleted` marks a tombstone."""

    config: EpisodeConfig
    state: EpisodeState = field(default_factory=EpisodeState)
    deleted: bool = False
