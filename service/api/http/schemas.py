"""Owns the shapes of requests and answers; the OpenAPI document is generated from them. Unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service.trajectory import Message

EpisodeId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
JsonObject = dict[str, Any]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextActions(_Request):
    """Any text."""

    type: Literal["text"]


class DiscreteActions(_Request):
    """One of 2 to 1,024 distinct strings."""

    type: Literal["discrete"]
    actions: list[str] = Field(min_length=2, max_length=1024)


class JsonActions(_Request):
    """A JSON value valid under the schema."""

    type: Literal["json"]
    schema_: JsonObject = Field(alias="schema")


class RegexActions(_Request):
    """A text that the pattern matches in full."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1)


class Tool(_Request):
    """A function as chat APIs describe it; `parameters` is the JSON schema of its arguments, an object."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str = ""
    parameters: JsonObject | None = None


class ToolActions(_Request):
    """A call of one of the tools: {"name", "arguments"}, valid under that tool's schema."""

    type: Literal["tools"]
    tools: list[Tool] = Field(min_length=1, max_length=128)


ActionSpace = Annotated[
    TextActions | DiscreteActions | JsonActions | RegexActions | ToolActions, Field(discriminator="type")
]


class SamplingRequest(_Request):
    """How actions are drawn; the policy's own defaults where not given. For discrete actions top_k, top_p and min_p
    filter the distribution over actions."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=256)]] | None = Field(None, max_length=16)


class ContextRequest(_Request):
    """What happens when an episode outgrows its context, and how large that is in tokens."""

    overflow: Literal["slide", "error", "end"] = "slide"
    max_tokens: int | None = Field(None, ge=16)


class ReasoningRequest(_Request):
    """A thought before each action, of at most `max_tokens` tokens. `history`: whether later prompts keep it."""

    max_tokens: int = Field(ge=1)
    history: Literal["keep", "drop"] = "keep"


_NO_NUL = r"^[^\x00]*$"
"""PostgreSQL has no such text."""
Label = Annotated[str, StringConstraints(max_length=128, pattern=_NO_NUL)]


class EpisodeFields(_Request):
    """What an episode is opened with; a profile may hold any of it."""

    instructions: str = ""
    goal: str | None = None
    action_space: ActionSpace = TextActions(type="text")
    sampling: SamplingRequest | None = None
    reasoning: ReasoningRequest | None = None
    context: ContextRequest | None = None
    policy: str | None = None
    max_steps: int | None = Field(None, gt=0, lt=2**31)
    idle_ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tags: list[Label] = Field([], max_length=64)
    metadata: JsonObject = {}
    group: Label | None = None


class EpisodeRequest(EpisodeFields):
    """POST /episode. `profile` names a preset (GET /profile); fields given here override its."""

    episode_id: EpisodeId | None = None
    profile: str | None = Field(None, max_length=128)


class TextPart(_Request):
    type: Literal["text"]
    text: str


Observation = str | JsonObject | list[TextPart]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _ActFields(_Request):
    observation: Observation | None = None
    reward: Number | None = None
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    info: JsonObject | None = None
    legal_actions: list[str] | None = None
    step: int | None = Field(None, ge=0, lt=2**31)

    def message(self) -> Message:
        observation = self.observation
        if isinstance(observation, list):
            observation = [part.model_dump() for part in observation]
        return Message(
            observation=observation,
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            success=self.success,
            info=self.info,
            legal_actions=None if self.legal_actions is None else tuple(self.legal_actions),
        )


class ActRequest(_ActFields):
    """POST /act."""

    episode_id: EpisodeId
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class BatchRequest(_Request):
    """POST /act/batch: acts of distinct episodes. Each is read by itself, so that a bad one spoils no other."""

    acts: list[JsonObject] = Field(min_length=1, max_length=1024)


class RecordRequest(_ActFields):
    """POST /episode/{id}/action: an observation, and the action that somebody else chose for it."""

    action: Any


class ForkRequest(_Request):
    """POST /episode/{id}/fork. `episode_ids`, `n` of them, make a retry safe; else the service makes them."""

    at_step: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=1024)
    episode_ids: list[EpisodeId] | None = None
    group: Label | None = None


class FeedbackRequest(_Request):
    """POST /episode/{id}/feedback: a human's rating of a step, or of the episode."""

    rating: int = Field(ge=1, le=5)
    comment: str | None = Field(None, max_length=10_000, pattern=_NO_NUL)
    rater: str | None = Field(None, min_length=1, max_length=128, pattern=_NO_NUL)
    step: int | None = Field(None, ge=0, lt=2**31)


class AdapterRequest(_Request):
    """PUT /policy/{name}: a folder below EPISODIC_ADAPTERS, in PEFT's format with safetensors."""

    path: str = Field(min_length=1, max_length=1024)


class EndRequest(_Request):
    """POST /episode/{id}/end. Neither terminated nor truncated: the episode is aborted."""

    reward: Number | None = None
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    info: JsonObject | None = None

    def message(self) -> Message:
        return Message(
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            success=self.success,
            info=self.info,
        )


class Usage(BaseModel):
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Timing(BaseModel):
    """Seconds: before the policy was asked, in the engine, in the store, and in all."""

    queue_s: float
    engine_s: float
    store_s: float
    total_s: float


class ParseFailure(BaseModel):
    kind: Literal["length", "json", "schema"]
    detail: str


class Act(BaseModel):
    """The answer to POST /act. At temperature 0 action_probs and logprob are those of temperature 1."""

    episode_id: str
    step: int
    action: Any
    text: str | None
    reasoning: str | None
    action_probs: dict[str, float] | None
    logprob: float | None
    finish_reason: str | None
    parse_failure: ParseFailure | None
    done: bool
    replayed: bool
    policy_version: str
    usage: Usage
    timing: Timing


class BatchAnswer(BaseModel):
    """One for each act, in order: its answer, or the problem it met."""

    results: list["Act | Problem"]


class Parent(BaseModel):
    """Where a fork branched off: the index of its own first step."""

    episode_id: str
    step: int


class Feedback(BaseModel):
    """A rating as it is kept; `created_at` in Unix seconds."""

    episode_id: str
    step: int | None
    rating: int
    comment: str | None
    rater: str | None
    created_at: float


class Episode(BaseModel):
    """The episode resource. Times are Unix seconds."""

    episode_id: str
    profile: str | None
    instructions: str
    goal: str | None
    action_space: JsonObject
    sampling: JsonObject | None
    reasoning: JsonObject | None
    context: JsonObject | None
    policy: str
    max_steps: int | None
    idle_ttl_s: float | None
    tags: list[str]
    metadata: JsonObject
    group: str | None
    status: Literal["active", "ended"]
    stop_reason: str | None
    success: bool | None
    step: int
    episode_return: float
    num_tokens: int
    policy_version: str
    parent: Parent | None
    created_at: float
    updated_at: float
    ended_at: float | None


class Forks(BaseModel):
    episodes: list[Episode]


class Policy(BaseModel):
    """What acts; `rank` and `loaded_at` (Unix seconds) are an adapter's."""

    name: str
    kind: Literal["base", "adapter"]
    policy_version: str
    base: str
    rank: int | None
    loaded_at: float | None


class PolicyList(BaseModel):
    policies: list[Policy]


class Profile(BaseModel):
    """A preset; `fields` are those of POST /episode."""

    name: str
    description: str
    fields: JsonObject


class ProfileList(BaseModel):
    profiles: list[Profile]


class EpisodePage(BaseModel):
    episodes: list[Episode]
    next_cursor: str | None


class Problem(BaseModel):
    """RFC 9457 problem details; further members depend on the code."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str


class Ready(BaseModel):
    status: str


class Version(BaseModel):
    version: str
    policy: str | None
    policy_version: str | None
    max_model_len: int | None
    template: dict[str, bool] | None
