"""The immutable values of a trajectory: the configuration and state of an episode, its steps, and how it ended."""

from array import array
from dataclasses import field, replace
from enum import StrEnum
from typing import Any, Literal, cast

from service.values import immutable

JsonValue = Any
Status = Literal["active", "ended"]
Overflow = Literal["slide", "error", "end"]

DEFAULT_TENANT = "default"
"""The tenant of callers without an API key."""


def qualified(tenant: str, episode_id: str) -> str:
    """Returns the id of an episode that is unique among all tenants: `tenant:id`.

    Several tenants can therefore use the same id. Neither part contains a colon. Ids of the default tenant have no
    prefix.
    """
    return episode_id if tenant == DEFAULT_TENANT else f"{tenant}:{episode_id}"


def public_id(episode_id: str) -> str:
    """Returns the id that the tenant uses for a qualified id."""
    return episode_id.rpartition(":")[2]


class StopReason(StrEnum):
    """Why an episode ended. `terminated` and `truncated` have the same meaning as in Gymnasium."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"
    MAX_STEPS = "max_steps"
    IDLE_TTL = "idle_ttl"
    CONTEXT_OVERFLOW = "context_overflow"
    ABORTED = "aborted"


IMAGE_PARTS = ("image_url", "image")
_PARTS = ("text", *IMAGE_PARTS)
"""The types of the parts of an observation."""


def is_parts(observation: JsonValue) -> bool:
    """Returns whether an observation is a list of parts: a list of objects whose `type` is that of a part."""
    if not isinstance(observation, list) or not observation:
        return False
    items = cast("list[JsonValue]", observation)
    return all(isinstance(item, dict) and cast("dict[str, JsonValue]", item).get("type") in _PARTS for item in items)


@immutable
class Sampling:
    """How an action is drawn from the policy.

    temperature: 0 takes the most likely action or token.
    top_p, top_k, min_p: in a discrete action space, they filter the distribution over actions, not over tokens.
    seed: makes steps reproducible: each random choice of a step has a generator that is seeded with seed, step and
    purpose.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a thought. The engine sets them; a caller cannot."""

    @property
    def has_filters(self) -> bool:
        """Whether top_k, top_p or min_p can cut the distribution."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@immutable
class ParseFailure:
    """Why the text of a completion is not an action.

    kind: "length" if `max_tokens` cut off the completion; "json" if the text is not JSON that can be stored; "schema"
    if the value is not valid under the schema.
    """

    kind: Literal["length", "json", "schema"]
    detail: str


@immutable
class Span:
    """The tokens that one step added: exactly those that the model received and sampled.

    token_ids: int32 ids. For a decoder-only model: the new turn and then the completion, so that the concatenated spans
    of a window are the context. For an encoder-decoder model: the ids of the decoder, beginning with the start token.
    loss_mask: one byte for each token: 1 if the policy sampled the token, else 0. In a discrete space, only
    tokens at which the legal actions differ are sampled.
    logprobs: float32 for each token: log-probability of a sampled token under the distribution that it was sampled
    from, else 0.
    encoder_token_ids: int32 ids that the encoder received; None for a decoder-only model.
    support: int32: the ids among which each token was drawn, as a run-length code; see `service.engine.supports`. Empty
    if unknown.
    """

    token_ids: "array[int]"
    loss_mask: bytes
    logprobs: "array[float]"
    encoder_token_ids: "array[int] | None" = None
    support: "array[int]" = field(default_factory=lambda: array("i"))


EMPTY_SPAN = Span(array("i"), b"", array("f"))


@immutable
class Message:
    """The message of one act: the new observation, and what the environment returned for the previous action."""

    observation: JsonValue = None
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    info: dict[str, JsonValue] | None = None
    legal_actions: tuple[str, ...] | None = None

    @property
    def ends(self) -> StopReason | None:
        """The stop reason if this message ends the episode, else None. `terminated` has priority over `truncated`."""
        if self.terminated:
            return StopReason.TERMINATED
        return StopReason.TRUNCATED if self.truncated else None


@immutable
class Usage:
    """Number of tokens of one act: the prompt, the part of the prompt in the prefix cache, and the completion."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@immutable
class Decision:
    """A decision of the policy, and the tokens to store with it.

    span: the tokens that the step adds to the episode.
    window_start: index of the oldest step in the context, apart from step 0.
    logprob: log-probability of the action under the distribution that it was sampled from (at temperature 0: under that
    of temperature 1); None if the caller chose it.
    action_probs: probability of each legal action, or of the known ones; None if the action space is not discrete.
    legal_mass: the probability of all legal actions before the policy was restricted to them, at the first place where
    they differ; None if the policy had no choice.
    dropped: range of the span that later windows leave out: a thought, if the episode does not keep thoughts.
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
    legal_mass: float | None = None
    parse_failure: ParseFailure | None = None
    reasoning: str | None = None
    dropped: tuple[int, int] = (0, 0)


@immutable
class Step:
    """One stored step of an episode: an observation and the action for it.

    message: contains the observation, and the reward for the previous action.
    closing: true for the message that ended the episode, which has no action.
    window_start: index of the oldest step in the context, apart from step 0.
    answer: the answer to POST /act, without `replayed` and `timing`.
    digest: digest of the request body, which identifies a retry.
    created_at: Unix seconds.
    dropped: range of the span that later windows leave out: a thought that the episode does not keep.
    temperature: of the episode's sampling when the step was decided; None for a closing step and steps of older
    versions.
    seconds: from the arrival of the request until the commit began; None if the policy did not decide.
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
    temperature: float | None = None
    seconds: float | None = None


@immutable
class EpisodeConfig:
    """The configuration of an episode.

    episode_id: qualified by the tenant, as everywhere below the API.
    request: the body of POST /episode with the fields of its profile. GET /episode/{episode_id} returns it.
    digest: digest of the request body, which identifies a retry.
    policy_version: the policy's weights when the episode was opened.
    created_at: Unix seconds.
    parent: for a fork, the episode that it was forked from, and the index of the fork's own first step.
    policy_digest: the adapter that acts in all steps; None for the base model, if the episode follows the alias, and if
    an older version opened it.
    """

    episode_id: str
    request: dict[str, JsonValue]
    digest: bytes
    policy_version: str
    created_at: float
    parent: tuple[str, int] | None = None
    policy_digest: str | None = None

    @property
    def policy_pin(self) -> str | None:
        """What identifies the version that acts in all steps: its digest, or else its `policy_version`. None if the
        episode follows the alias."""
        if self.request.get("policy_updates") == "follow":
            return None
        return self.policy_digest or self.policy_version

    @property
    def tenant(self) -> str:
        return self.episode_id.rpartition(":")[0] or DEFAULT_TENANT


@immutable
class EpisodeState:
    """The part of an episode that changes with each committed step.

    step: index of the next step.
    num_tokens: number of tokens in the spans of all steps; the ids that an encoder received are not counted.
    num_parse_failures, num_recorded: number of steps whose text is not an action, and of those whose action somebody
    else chose; None if an older version opened the episode.
    updated_at, ended_at, expires_at: Unix seconds.
    """

    step: int = 0
    status: Status = "active"
    stop_reason: StopReason | None = None
    success: bool | None = None
    episode_return: float = 0.0
    num_tokens: int = 0
    num_parse_failures: int | None = None
    num_recorded: int | None = None
    updated_at: float = 0.0
    ended_at: float | None = None
    expires_at: float | None = None
    """When the episode ends if no act follows; None for never."""


@immutable
class Feedback:
    """A human's rating, 1 to 5.

    step: index of the rated step; None if the rating is for the whole episode.
    rater: name of the person. A later rating of the same step by the same rater replaces the earlier one.
    created_at: Unix seconds.
    idempotency_key: identifies a retry.
    """

    episode_id: str
    step: int | None
    rating: int
    comment: str | None
    rater: str | None
    created_at: float
    idempotency_key: str | None = None

    def repeats(self, other: "Feedback") -> bool:
        """Returns whether this is the same rating, apart from its time."""
        return replace(self, created_at=other.created_at) == other


@immutable
class StoredVersion:
    """A version of an adapter, as it is stored. Only its lineage ever changes.

    digest: SHA-256 of the adapter's files, in hex.
    version: identified the weights of the adapter and of the base model together when the version was loaded first.
    loaded_at: Unix seconds.
    parent, round, evaluation: the lineage that the caller gave. `parent` names a version, `evaluation` is JSON.
    """

    name: str
    digest: str
    version: str
    rank: int
    loaded_at: float
    parent: str | None = None
    round: int | None = None
    evaluation: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Name and digest, which identify the version."""
        return self.name, self.digest

    @property
    def reference(self) -> str:
        """The name of the version for callers."""
        return reference(self.name, self.digest)

    def has_reference(self, name: str) -> bool:
        """Whether a name of the form `name@digest` names this version. The digest may be a prefix."""
        own, at, prefix = name.partition("@")
        return bool(at) and own == self.name and self.digest.startswith(prefix)


def reference(name: str, digest: str) -> str:
    """Returns the name of a version for callers: `name@` and the first 12 characters of its digest."""
    return f"{name}@{digest[:12]}"


@immutable
class Catalog:
    """The stored policies.

    versions: sorted by name, and those of one name by `loaded_at`.
    aliases: the digest that each alias points to, by name.
    previous: the digest that each alias pointed to before, by name, if there is one.
    default: the policy of new episodes that name none, if an operator chose one.
    """

    versions: tuple[StoredVersion, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    previous: dict[str, str] = field(default_factory=dict[str, str])
    default: str | None = None

    def find(self, key: tuple[str, str]) -> StoredVersion | None:
        """Returns the version with this name and digest."""
        return next((version for version in self.versions if version.key == key), None)


@immutable
class StoredKey:
    """An API key as it is stored.

    key_id: the public part of the key.
    digest: SHA-256 of the whole key.
    created_at, revoked_at: Unix seconds. A revoked key stays stored, so that its id in a log still leads to its tenant.
    """

    key_id: str
    digest: bytes
    tenant: str
    scopes: tuple[str, ...]
    created_at: float
    revoked_at: float | None = None


@immutable
class StoredEpisode:
    """An episode as it is stored, without its steps. `deleted` marks a tombstone. `rating` is the mean of its ratings,
    if the episode was read from a list that is sorted by it."""

    config: EpisodeConfig
    state: EpisodeState = field(default_factory=EpisodeState)
    deleted: bool = False
    rating: float | None = None
