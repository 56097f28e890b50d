"""Models of request and response bodies. The OpenAPI document is generated from them and from their docstrings."""

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from service.api.http import tool_forms
from service.errors import Unprocessable
from service.trajectory import IMAGE_PARTS, Message, is_parts

PARENT = r"^[A-Za-z0-9_.-]{1,64}@[0-9a-f]{8,64}$"
"""A version of an adapter."""
EPISODE_ID = r"^[A-Za-z0-9_-]{1,128}$"
EpisodeId = Annotated[str, StringConstraints(pattern=EPISODE_ID)]
JsonObject = dict[str, Any]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class _Response(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class TextActions(_Request):
    """An action is any text."""

    type: Literal["text"]


class DiscreteActions(_Request):
    """An action is one of 2 to 1,024 distinct strings."""

    type: Literal["discrete"]
    actions: list[str] = Field(min_length=2, max_length=1024)
    probs: Literal["all", "taken"] | None = None
    """Of which actions `action_probs` has the probability: of all legal ones, or of the one taken and those that became
    known on the way, which needs fewer requests to the model. By default of all, if there are at most 64 legal actions
    or if one request is enough. The action is drawn from the same distribution."""


class JsonActions(_Request):
    """An action is a JSON value that is valid under a JSON schema."""

    type: Literal["json"]
    schema_: JsonObject = Field(alias="schema")
    """The JSON schema of an action."""
    strict: bool = True
    """Whether keywords that cannot be enforced are refused. Otherwise they are checked after the action is written."""


class RegexActions(_Request):
    """An action is a text that a regular expression matches in full."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1)
    """The regular expression. It must match the whole action."""


class Tool(_Request):
    """A function that the policy can call, as chat APIs describe it.

    These forms are accepted, too: `{"type": "function", "function": {...}}` (OpenAI), `inputSchema` (Model Context
    Protocol) and `input_schema` (Anthropic) instead of `parameters`. The episode shows the form of this model.
    """

    name: str = Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")
    description: str = ""
    """What the tool does. The policy reads it."""
    parameters: JsonObject | None = None
    """The JSON schema of the arguments, an object. Without it, the tool takes no arguments."""

    @model_validator(mode="before")
    @classmethod
    def _translated(cls, given: Any) -> Any:
        return tool_forms.translated(cast("JsonObject", given)) if isinstance(given, dict) else given


class ToolActions(_Request):
    """An action is a tool call, `{"name": ..., "arguments": {...}}`, that is valid under the tool's schema."""

    type: Literal["tools"]
    tools: list[Tool] = Field(min_length=1, max_length=128)
    strict: bool = True
    """Whether keywords that cannot be enforced are refused. Otherwise they are checked after the action is written."""


ActionSpace = Annotated[
    TextActions | DiscreteActions | JsonActions | RegexActions | ToolActions, Field(discriminator="type")
]


class SamplingRequest(_Request):
    """How actions are sampled. A field that is left out has the policy's default.

    In a discrete action space, `top_k`, `top_p` and `min_p` filter the distribution over actions, not over tokens.
    """

    temperature: float | None = Field(None, ge=0, le=100)
    """0 takes the most likely action or token."""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**63)
    """0 means no limit."""
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens of an action. Must be less than the context."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Makes each step reproducible: it is drawn from a generator seeded with (seed, step)."""
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=256)]] | None = Field(None, max_length=16)
    """Strings that end an action. Only for text action spaces."""


class ContextRequest(_Request):
    """The size of the context, and what happens when an episode outgrows it."""

    overflow: Literal["slide", "error", "end"] = "slide"
    """`slide`: drop the oldest steps, except step 0. `error`: 409 `context_overflow`. `end`: end the episode."""
    max_tokens: int | None = Field(None, ge=16, lt=2**63)
    """Size of the context in tokens: prompt and completion. At most, and by default, that of the model. For an
    encoder-decoder model: of what the encoder receives."""
    template: str | None = Field(None, max_length=1 << 16)
    """How the text for the encoder is made of `{instructions}`, `{history}` and `{observation}`. Without `{history}`
    the policy sees no earlier steps. Only for encoder-decoder models."""


class ReasoningRequest(_Request):
    """The policy writes a thought before each action."""

    max_tokens: int = Field(ge=1)
    """Maximum number of tokens of a thought."""
    history: Literal["keep", "drop"] = "keep"
    """Whether the prompts of later steps contain the thought."""


_NO_NUL = r"^[^\x00]*$"
"""PostgreSQL cannot store a NUL character in text."""
Label = Annotated[str, StringConstraints(max_length=128, pattern=_NO_NUL)]


class EpisodeFields(_Request):
    """The options of an episode. A profile can set each of them."""

    instructions: str = ""
    """The system message of the policy."""
    goal: str | None = None
    """What the policy should achieve. It is added to the system message."""
    action_space: ActionSpace = TextActions(type="text")
    sampling: SamplingRequest | None = None
    reasoning: ReasoningRequest | None = None
    """Without it, the policy writes no thoughts."""
    context: ContextRequest | None = None
    policy: str | None = None
    """A name from GET /policy, or a version, `name@digest`. The default is `default` of GET /policy: the base
    model, unless an operator chose another one."""
    policy_updates: Literal["pinned", "follow"] = "pinned"
    """`pinned`: all steps are taken by the version that `policy` names when the episode is opened. `follow`: each step
    is taken by the version that `policy` names at that time."""
    max_steps: int | None = Field(None, gt=0, lt=2**31)
    """The episode ends after this many steps."""
    idle_ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Idle timeout: the episode ends after this many seconds without an act."""
    tags: list[Label] = Field([], max_length=64)
    """Labels to filter episodes by. The policy does not see them."""
    metadata: JsonObject = {}
    """Any JSON object. It is stored and returned with the episode. The policy does not see it."""
    group: Label | None = None
    """A label shared by related episodes, to filter by. The policy does not see it."""


class EpisodeRequest(EpisodeFields):
    """Body of POST /episode."""

    episode_id: EpisodeId | None = None
    """The id of the episode. Choose it to make retries safe; otherwise the service generates a UUIDv7."""
    profile: str | None = Field(None, max_length=128)
    """A preset from GET /profile. Fields of this body override those of the profile."""


def _check_parts(observation: Any) -> Any:
    """Returns the observation. Raises Unprocessable if it is a list of parts, and the policy cannot be shown one."""
    parts: list[JsonObject] = observation if is_parts(observation) else []
    for number, part in enumerate(parts):
        if part["type"] in IMAGE_PARTS:
            detail = f"observation.{number}: this part is an image, and the policy cannot see images. Send text."
            raise Unprocessable(detail, "observation", number)
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            detail = f'observation.{number}: a text part is {{"type": "text", "text": "..."}} without other fields.'
            raise Unprocessable(detail, "observation", number)
    return observation


Observation = Annotated[
    Any,
    AfterValidator(_check_parts),
    WithJsonSchema({"type": ["string", "object", "array", "number", "boolean", "null"]}),
]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _ActFields(_Request):
    observation: Observation = None
    """What the policy observes: any JSON value but null. Text is shown unchanged, other values as compact JSON. A list
    in which every element is an object with the `type` `text` (or `image_url`, `image`) is a list of parts, whose texts
    are joined by line breaks; images are refused. Required unless this message ends the episode."""
    reward: Number | None = None
    """The reward for the previous action."""
    terminated: bool = False
    """The environment reached a final state: the episode ends, and no action is chosen."""
    truncated: bool = False
    """The episode was cut short, for example by a time limit: the episode ends, and no action is chosen."""
    success: bool | None = None
    """Whether the episode reached its goal. Only with `terminated` or `truncated`."""
    info: JsonObject | None = None
    """Any JSON object. It is stored with the step. The policy does not see it."""
    legal_actions: list[str] | None = None
    """The actions of a discrete space that are allowed in this step. By default all are allowed."""
    step: int | None = Field(None, ge=0, lt=2**31)
    """The index of this step, from 0. It makes retries safe: the same step with the same body returns the stored step.
    A step that is not the next one is refused (409 `step_conflict`)."""

    def message(self) -> Message:
        """Returns the part of the body that is stored with the step."""
        return Message(
            observation=self.observation,
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            success=self.success,
            info=self.info,
            legal_actions=None if self.legal_actions is None else tuple(self.legal_actions),
        )


class ActRequest(_ActFields):
    """Body of POST /act."""

    episode_id: EpisodeId
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Timeout in seconds. If it expires before the commit, the answer is 504 `deadline_exceeded`: no step is taken."""


class BatchRequest(_Request):
    """Body of POST /act/batch."""

    acts: list[JsonObject] = Field(min_length=1, max_length=1024)
    """Bodies of POST /act, each of another episode. Each is validated on its own: an invalid one affects no other."""


class RecordRequest(_ActFields):
    """Body of POST /episode/{episode_id}/action: an observation, and the action that was chosen for it."""

    action: Any
    """An action of the episode's action space."""


class ForkRequest(_Request):
    """Body of POST /episode/{episode_id}/fork."""

    at_step: int | None = Field(None, ge=0)
    """The forks share the steps before this one. By default they share all steps."""
    n: int = Field(1, ge=1, le=1024)
    """The number of forks."""
    episode_ids: list[EpisodeId] | None = None
    """The ids of the forks, `n` distinct ones. Choose them to make retries safe. By default they are generated."""
    group: Label | None = None
    """The group of the forks. The default is the group of this episode, or its id if it has none."""


class FeedbackRequest(_Request):
    """Body of POST /episode/{episode_id}/feedback: a human's rating of a step or of the whole episode."""

    rating: int = Field(ge=1, le=5)
    """From 1 (worst) to 5 (best)."""
    comment: str | None = Field(None, max_length=10_000, pattern=_NO_NUL)
    rater: str | None = Field(None, min_length=1, max_length=128, pattern=_NO_NUL)
    """The name of the person who rates. A later rating of the same step by the same rater replaces the earlier one."""
    step: int | None = Field(None, ge=0, lt=2**31)
    """The index of the rated step. Without it, the rating is for the whole episode."""


class AdapterRequest(_Request):
    """Body of PUT /policy/{name}."""

    path: str | None = Field(None, min_length=1, max_length=1024)
    """The folder of a LoRA adapter, relative to EPISODIC_ADAPTERS, in PEFT's format with safetensors."""
    version: str | None = Field(None, min_length=1, max_length=256)
    """A version from GET /policy, `name@digest`, instead of `path`. At least 8 characters of the digest are needed."""
    alias: bool = True
    """Whether the name points to this version from now on. Otherwise the version is only loaded."""
    parent: str | None = Field(None, pattern=PARENT)
    """The version that this one was made from, `name@digest`."""
    round: int | None = Field(None, ge=0, lt=2**31)
    """The number of the training round."""
    evaluation: JsonObject | None = None
    """Any JSON object of at most 16 KiB, for example the results of an evaluation."""


class DefaultPolicyRequest(_Request):
    """Body of PUT /policy-default."""

    policy: str | None = Field(min_length=1, max_length=160)
    """A name from GET /policy, or a version, `name@digest`. Null leaves the choice to EPISODIC_DEFAULT_POLICY."""


class EndRequest(_Request):
    """Body of POST /episode/{episode_id}/end. The stop reason is `aborted` if neither `terminated` nor `truncated` is
    true."""

    reward: Number | None = None
    """The reward for the last action."""
    terminated: bool = False
    """The environment reached a final state."""
    truncated: bool = False
    """The episode was cut short, for example by a time limit."""
    success: bool | None = None
    """Whether the episode reached its goal."""
    info: JsonObject | None = None
    """Any JSON object. It is stored with the episode's last message."""

    def message(self) -> Message:
        """Returns the message that ends the episode."""
        return Message(
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            success=self.success,
            info=self.info,
        )


class Usage(_Response):
    """Numbers of tokens."""

    prompt_tokens: int
    cached_tokens: int
    """The part of the prompt that was in the prefix cache."""
    completion_tokens: int


class Timing(_Response):
    """Durations in seconds. All are 0 for a retry of a stored step."""

    queue_s: float
    """From the arrival of the request until it got its first slot of the engine."""
    engine_s: float
    """From the first slot until the decision."""
    store_s: float
    """The commit of the step."""
    total_s: float


class ParseFailure(_Response):
    """Why the policy's text is not an action."""

    kind: Literal["length", "json", "schema"]
    """`length`: `max_tokens` cut the text. `json`: not a storable JSON value. `schema`: invalid under the schema."""
    detail: str


class Act(_Response):
    """The answer to POST /act: one step of the episode."""

    episode_id: str
    step: int
    """The index of the step, from 0."""
    action: Any
    """The action as a JSON value. Null if the episode ended or the text is not an action (`parse_failure`)."""
    text: str | None
    """The action as the policy wrote it."""
    reasoning: str | None
    """The thought before the action."""
    action_probs: dict[str, float] | None
    """The policy's distribution over the legal actions of a discrete space; see its field `probs`. At temperature 0,
    that of temperature 1."""
    legal_mass: float | None
    """The probability that the policy gave all legal actions before it was restricted to them, at the first place where
    these differ. Null if there was no choice."""
    logprob: float | None
    """Log-probability of the action under the distribution that it was sampled from. At temperature 0, under that of
    temperature 1. Null for a recorded action."""
    finish_reason: str | None
    """`stop`, `length` (cut by `max_tokens`), or `recorded` (chosen by a human or another policy)."""
    parse_failure: ParseFailure | None
    done: bool
    """Whether the episode has ended."""
    replayed: bool
    """Whether this is the stored answer to an earlier request. A retry changes nothing."""
    policy_version: str
    """The version of the weights that chose the action."""
    usage: Usage
    timing: Timing


class BatchAnswer(_Response):
    """The answer to POST /act/batch."""

    results: list["Act | Problem"]
    """One result for each act, in the order of the request: its answer, or the problem that made it fail."""


class Parent(_Response):
    """The branch point of a fork."""

    episode_id: str
    """The episode that was forked."""
    step: int
    """The index of the first step that the fork does not share with its parent."""


class Feedback(_Response):
    """A stored rating."""

    episode_id: str
    step: int | None
    """Null if the rating is for the whole episode."""
    rating: int
    comment: str | None
    rater: str | None
    created_at: float
    """Unix time in seconds."""


class Episode(_Response):
    """An episode: the options that it was opened with, and its current state. Times are Unix times in seconds."""

    episode_id: str
    profile: str | None
    instructions: str
    goal: str | None
    action_space: JsonObject
    sampling: JsonObject | None
    reasoning: JsonObject | None
    context: JsonObject | None
    policy: str
    policy_updates: Literal["pinned", "follow"]
    max_steps: int | None
    idle_ttl_s: float | None
    tags: list[str]
    metadata: JsonObject
    group: str | None
    status: Literal["active", "ended"]
    stop_reason: str | None
    """Why the episode ended: terminated, truncated, max_steps, idle_ttl, context_overflow, or aborted."""
    success: bool | None
    step: int
    """The index of the next step, which is the number of steps taken."""
    episode_return: float
    """The sum of all rewards."""
    num_tokens: int
    """The number of tokens of all steps."""
    policy_version: str
    """The version of the policy's weights when the episode was opened."""
    parent: Parent | None
    """The branch point, if the episode is a fork."""
    created_at: float
    updated_at: float
    ended_at: float | None


class Support(_Response):
    """What a sampled token was sampled among. Renormalising the model's distribution over `ids` (or over the whole
    vocabulary, for `all`) at the segment's temperature gives the stored log-probability."""

    kind: Literal["ids", "all", "filtered"]
    """`ids`: the token ids in `ids`. `all`: the whole vocabulary. `filtered`: unknown, because `top_k`, `top_p`,
    `min_p` or a grammar cut the vocabulary; no renormalisation gives the log-probability."""
    ids: list[int] = []


class Segment(_Response):
    """A run of steps in which each prompt begins with the whole prompt and action of the step before. The lists except
    `steps`, `rewards`, `step_starts` and `policy_versions` have one entry for each token."""

    steps: list[int]
    """The indices of the steps."""
    rewards: list[float | None]
    """The reward for the action of each step."""
    step_starts: list[int]
    """The index of the first token of each step. What precedes the first one belongs to earlier steps."""
    window_start: int
    """The first step after step 0 that the context contained."""
    policy_versions: list[str]
    """The version of the weights that acted, for each step."""
    temperature: float
    """The temperature of the sampling. 1 where 0 was asked for, because the stored log-probabilities are then those of
    temperature 1."""
    encoder_token_ids: list[int] = []
    """What the encoder received; only for encoder-decoder models."""
    token_ids: list[int]
    """All tokens that the policy received or sampled. For an encoder-decoder model: those of the decoder."""
    loss_mask: list[int]
    """1 for tokens that the policy sampled in a step of this segment, else 0."""
    logprobs: list[float]
    """The log-probability of each token with mask 1 under the distribution that it was sampled from, else 0."""
    support: list[Support | None]
    """What each token with mask 1 was sampled among, else null."""
    recorded_mask: list[int]
    """1 for tokens of actions that a human or another policy chose in a step of this segment, else 0."""


class StepTrajectory(_Response):
    """A trajectory with `format=steps`."""

    episode: Episode
    format: Literal["steps"]
    steps: list[JsonObject]
    closing: JsonObject | None
    """The message that ended the episode."""
    feedback: list[Feedback]
    next_step: int | None = None
    """The `from_step` of the next page; only in pages."""


class MessageTrajectory(_Response):
    """A trajectory with `format=messages`."""

    episode: Episode
    format: Literal["messages"]
    messages: list[JsonObject]
    next_step: int | None = None
    """The `from_step` of the next page; only in pages."""


class TokenTrajectory(_Response):
    """A trajectory with `format=tokens`, for training."""

    episode: Episode
    format: Literal["tokens"]
    segments: list[Segment]
    feedback: list[Feedback]


Trajectory = Annotated[StepTrajectory | MessageTrajectory | TokenTrajectory, Field(discriminator="format")]


class Forks(_Response):
    """The answer to POST /episode/{episode_id}/fork."""

    episodes: list[Episode]


class Policy(_Response):
    """A policy that episodes can be opened with: the base model, or the base model with a LoRA adapter."""

    name: str
    kind: Literal["base", "adapter"]
    policy_version: str
    """Identifies the weights. It changes when the name points to another version."""
    base: str
    """The name of the base model."""
    rank: int | None
    """The rank of the adapter; null for the base model."""
    loaded_at: float | None
    """When the version was loaded first, as Unix time in seconds; null for the base model."""
    version: str | None
    """The version that the name points to, `name@digest`; null for the base model."""
    previous: str | None
    """The version that a rollback would return to, if there is one."""


class PolicyVersion(_Response):
    """A version of a LoRA adapter. It never changes, apart from its lineage: `parent`, `round` and `evaluation`."""

    version: str
    """`name@digest`, with the first 12 characters of the digest. Episodes can be opened with it."""
    name: str
    kind: Literal["adapter"]
    digest: str
    """SHA-256 of the adapter's files."""
    policy_version: str
    """Identifies the weights of the adapter and of the base model together, as each step stores it."""
    base: str
    """The name of the base model."""
    rank: int
    loaded_at: float
    """When the version was loaded first, as Unix time in seconds."""
    current: bool
    """Whether `name` points to this version."""
    parent: str | None
    """The version that this one was made from."""
    round: int | None
    evaluation: JsonObject | None


class PolicyList(_Response):
    """The answer to GET /policy."""

    policies: list[Policy]
    """The names that episodes can be opened with, and where they point."""
    versions: list[PolicyVersion]
    """All stored versions, by name and time."""
    default: str
    """The policy of new episodes that name none."""


class DefaultPolicy(_Response):
    """The answer to PUT /policy-default."""

    default: str
    """The policy of new episodes that name none."""


class Profile(_Response):
    """A preset for POST /episode."""

    name: str
    description: str
    fields: JsonObject
    """The fields of POST /episode that the profile sets."""


class ProfileList(_Response):
    """The answer to GET /profile."""

    profiles: list[Profile]


class EpisodePage(_Response):
    """A page of episodes."""

    episodes: list[Episode]
    next_cursor: str | None
    """Pass it as `cursor` to get the next page, which may be empty. Null if there is no next page."""


class Problem(_Response):
    """An error, as RFC 9457 problem details. Some codes have more members."""

    model_config = ConfigDict(extra="allow")

    type: str
    """`/problems/` and the code."""
    title: str
    """A short description of the kind of error."""
    status: int
    """The HTTP status."""
    code: str
    """A stable name of the error, for programs."""
    detail: str
    """What was wrong, where, and what to do, for people. The text may change between versions."""
    request_id: str
    """The request id, as in the header X-Request-ID and in the server's log."""


class Ready(_Response):
    """The answer to a health check."""

    status: str


class Description(_Response):
    """The answer to GET /."""

    name: str
    version: str
    """The version of the service."""
    description: str
    links: dict[str, str]
    """The paths of some calls, by name."""


class Version(_Response):
    """The versions of the service and of the policy."""

    version: str
    """The version of the service."""
    policy: str | None
    """The name of the base model."""
    policy_version: str | None
    """Identifies the weights of the base model."""
    max_model_len: int | None
    """Maximum number of tokens of prompt and completion together."""
    template: dict[str, bool] | None
    """How the model's chat template behaves."""
