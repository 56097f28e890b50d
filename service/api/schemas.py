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


ActionSpace = Annotated[TextActions | DiscreteActions | JsonActions | RegexActions, Field(discriminator="type")]


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


class EpisodeRequest(_Request):
    """POST /episode."""

    episode_id: EpisodeId | None = None
    instructions: str = ""
    goal: str | None = None
    action_space: ActionSpace = TextActions(type="text")
    sampling: SamplingRequest | None = None
    context: ContextRequest | None = None
    policy: str | None = None
    max_steps: int | None = Field(None, gt=0)
    tags: list[Annotated[str, StringConstraints(max_length=128)]] = Field([], max_length=64)
    metadata: JsonObject = {}
    group: str | None = Field(None, max_length=128)


class TextPart(_Request):
    type: Literal["text"]
    text: str


Observation = str | JsonObject | list[TextPart]
Number = Annotated[float, Field(allow_inf_nan=False)]


class ActRequest(_Request):
    """POST /act."""

    episode_id: EpisodeId
    observation: Observation | None = None
    reward: Number | None = None
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    info: JsonObject | None = None
    legal_actions: list[str] | None = None
    step: int | None = Field(None, ge=0)
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

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


class Episode(BaseModel):
    """The episode resource. Times are Unix seconds."""

    episode_id: str
    instructions: str
    goal: str | None
    action_space: JsonObject
    sampling: JsonObject | None
    context: JsonObject | None
    policy: str
    max_steps: int | None
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
    parent: JsonObject | None
    created_at: float
    updated_at: float
    ended_at: float | None


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
