"""The seam to the model: the `Engine` protocol and the values that cross it.

An engine turns a transcript and an action space into a decision. Whether its model is decoder-only or encoder-decoder,
and how a transcript becomes the model's input, is the engine's business. docs/architecture.md describes the seam.
"""

import hashlib
import random
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Protocol, Self

from starlette.types import ASGIApp

from service.engine.adapters import Shapes
from service.trajectory import DEFAULT_TENANT, Decision, JsonValue, ParseFailure, Sampling, Step

StreamKind = Literal["reasoning", "text"]
OnText = Callable[[str], None]
Slot = Callable[[], AbstractAsyncContextManager[None]]
"""Waits for a slot in the engine, and holds it while the context is open. Entered around each request to the model."""


class EngineUnavailable(Exception):
    """The engine is loading, failed, or was closed."""

    code: ClassVar = "engine_unavailable"


class EngineRefused(ValueError):
    """The engine cannot be built from its settings, and a retry would not help. The message says why."""


class ActionSpaceRefused(ValueError):
    """The action space cannot be served. The message says why; `field` is the request field to blame."""

    def __init__(self, message: str, field: str = "action_space") -> None:
        super().__init__(message)
        self.field = field


class ConstraintRefused(ActionSpaceRefused):
    """The engine cannot enforce the constraint, or not within its limits."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a completion must be: JSON valid under `spec` (a schema as JSON text), or text that the pattern `spec`
    matches in full. The other kinds come from `/v1` only: a grammar in EBNF or Lark, or xgrammar's structural tag as
    JSON."""

    kind: Literal["json", "regex", "grammar", "lark", "structural_tag"]
    spec: str


class ActionSpace(Protocol):
    """What an action may be, as an engine needs to know it: one of `choices`, or text under `constraint`."""

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The legal actions as distinct texts; None if an action is written freely."""
        ...

    @property
    def constraint(self) -> Constraint | None:
        """What a written action must be; None for any text."""
        ...

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        """The action that a completion's text stands for, or why it is none."""
        ...


class History(Protocol):
    """The spans of an episode's committed steps, in the form that its engine needs to decide the next step."""

    def append(self, step: Step) -> None:
        """Adds a committed step that has an action."""
        ...

    def copy(self) -> Self: ...


@dataclass(frozen=True, slots=True)
class Transcript:
    """What the policy may see: the system message, the steps so far, and the new observation.

    max_tokens: size of the context. slides: whether the oldest steps may be dropped to make room.
    """

    system: str
    history: History
    observation: JsonValue
    max_tokens: int
    slides: bool


@dataclass(frozen=True, slots=True)
class ReasoningBudget:
    """A thought of at most `max_tokens` tokens before each action. `keep`: later prompts contain it."""

    max_tokens: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """An action that somebody other than the policy chose, and its text."""

    action: JsonValue
    text: str


class TextSink:
    """Receives streamed text. `has_emitted` is true once any text was emitted."""

    def __init__(self, emit: Callable[[StreamKind, str], None]) -> None:
        self._emit = emit
        self.has_emitted = False

    def of(self, kind: StreamKind) -> OnText:
        """A callback for text of this kind."""
        return partial(self._receive, kind)

    def _receive(self, kind: StreamKind, delta: str) -> None:
        self.has_emitted = True
        self._emit(kind, delta)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in a folder that does not change; `version` names its weights and the base model's."""

    name: str
    version: str
    path: str
    rank: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a decision, beside the action space.

    generator: gives the random generator for a purpose; the same one again if the episode has a seed.
    slot: entered around each request to the model.
    recorded: somebody else's action; the policy draws nothing then.
    """

    sampling: Sampling
    generator: Callable[[str], random.Random]
    slot: Slot
    reasoning: ReasoningBudget | None = None
    recorded: Recorded | None = None
    adapter: Adapter | None = None
    cache_salt: str | None = None
    sink: TextSink | None = None


@dataclass(frozen=True, slots=True)
class Overflow:
    """No decision: the observation and its action do not fit into the context."""


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """How the model's chat template behaves.

    append_only: false if it rewrites earlier turns. canonical: false if its own tokenization of a conversation differs
    from the token log's. system_role: false if the instructions go into the first observation. plain: true if the
    model has no chat template.
    """

    append_only: bool
    canonical: bool
    system_role: bool
    plain: bool


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is served. `version` changes whenever the weights do; `max_model_len` is in tokens."""

    model: str
    version: str
    max_model_len: int
    default_sampling: Sampling
    weight_shapes: Shapes | None = None
    """The shapes that an adapter must fit, if they are known."""
    max_lora_rank: int = 0
    """0 if the engine takes no adapters."""
    num_slots: int = 256
    """Requests that it batches at once."""
    generates: bool = True
    """False for a model that embeds or classifies: it serves /v1 and no episodes."""
    think_tags: tuple[str, str] | None = None
    """The model's own tags around a thought, if it has any."""


_SALT_KEY = secrets.token_bytes(32)


def cache_salt(tenant: str) -> str | None:
    """A salt that keeps a tenant's prefix-cache blocks apart, so that timing does not reveal other tenants' prompts.
    It is secret, because callers of /v1 may name a salt of their own. The default tenant has none."""
    if tenant == DEFAULT_TENANT:
        return None
    return hashlib.blake2b(tenant.encode(), key=_SALT_KEY, digest_size=16).hexdigest()


CACHE_SALT: ContextVar[str | None] = ContextVar("cache_salt", default=None)
"""The salt of the /v1 request that is being served, since all callers share that app."""


class Engine(Protocol):
    """A model that decides. Cancelling a call aborts its requests."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def template(self) -> TemplateReport: ...

    @property
    def healthy(self) -> bool:
        """False for ever once the engine died."""
        ...

    @property
    def heartbeat(self) -> int:
        """Changes with every sign of life: an output of any request, an answer to `probe`."""
        ...

    def history(self) -> History:
        """The history of an episode that has no steps yet."""
        ...

    async def decide(self, transcript: Transcript, space: ActionSpace, wanted: Wanted) -> Decision | Overflow:
        """The policy's decision for the transcript's observation, with exactly the tokens it was given and drew.

        Raises EngineUnavailable, and ActionSpaceRefused for a space that `check` would refuse.
        """
        ...

    async def check(self, space: ActionSpace) -> None:
        """Does everything that could fail in `decide` because of the space, off the event loop and within limits.
        Raises ActionSpaceRefused."""
        ...

    async def matches(self, constraint: Constraint, text: str) -> bool:
        """Whether a completion under the constraint could be this text. Raises ConstraintRefused."""
        ...

    async def watch(self) -> None:
        """Returns when the engine has died. Flushes its statistics meanwhile."""
        ...

    async def probe(self) -> None:
        """Asks the engine for a sign of life. Raises EngineUnavailable."""
        ...

    def kill(self) -> None:
        """Ends the engine at once, even if it hangs. Calls in flight raise EngineUnavailable."""
        ...

    async def load_adapter(self, adapter: Adapter) -> None:
        """Makes the adapter available to `decide`. Raises AdapterRefused."""
        ...

    async def unload_adapter(self, adapter: Adapter) -> None:
        """Frees the adapter's memory. Calls in flight under it complete."""
        ...

    async def openai_app(self) -> ASGIApp | None:
        """An app that serves /v1 on this engine, made at the first call; None if the engine has none."""
        ...

    async def close(self) -> None:
        """Frees what the engine uses, dead or alive."""
        ...
