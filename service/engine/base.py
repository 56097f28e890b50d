"""The interface of an engine: the `Engine` protocol, and the values that it receives and returns.

An engine turns a transcript and an action space into a decision. The rest of the service does not depend on how the
engine does so: its model may be decoder-only or encoder-decoder. docs/architecture.md describes this interface.
"""

import asyncio
import hashlib
import random
import secrets
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import ClassVar, Literal, Protocol, Self

from starlette.types import ASGIApp

from service.engine.adapters import Shapes
from service.trajectory import DEFAULT_TENANT, Decision, JsonValue, ParseFailure, Sampling, Step
from service.values import immutable

StreamKind = Literal["reasoning", "text"]
Probs = Literal["all", "taken"]
"""Which probabilities of discrete actions a decision gives: those of all, or that of the action taken and of others
that became known on the way. The action is drawn from the same distribution."""
OnText = Callable[[str], None]
Slot = Callable[[], AbstractAsyncContextManager[None]]
"""Returns a context manager that waits for a slot of the engine, and occupies the slot until it exits. The engine uses
one around each request to the model."""


class EngineUnavailable(Exception):
    """The engine is loading, has failed, or was closed. A retry may succeed once it is loaded."""

    code: ClassVar = "engine_unavailable"
    retry_after_s: ClassVar = 5
    """Value of Retry-After: loading takes at least this many seconds."""


@contextmanager
def uncancelled() -> Generator[None]:
    """Turns a cancellation that the engine itself has caused into EngineUnavailable.

    Without this it would look as if the caller had left, and a caller that is still there would get no answer.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise EngineUnavailable("the engine has cancelled the request; retry later") from error


class EngineRefused(ValueError):
    """The engine cannot be loaded with its settings, and a retry does not help. The message says why."""


class ActionSpaceRefused(ValueError):
    """The action space is invalid or not supported. The message says why; `field` names the request field at fault."""

    def __init__(self, message: str, field: str = "action_space") -> None:
        super().__init__(message)
        self.field = field


class ConstraintRefused(ActionSpaceRefused):
    """The engine cannot enforce the constraint, or cannot compile it within the limits of time and memory."""


@immutable
class Constraint:
    """A constraint on a completion.

    kind "guidance": the completion is derived by the grammar `spec`, in llguidance's dialect of Lark.
    Other kinds come from `/v1` only, and are compiled by xgrammar: a JSON schema, a regular expression, a grammar in
    EBNF or Lark, or a structural tag as JSON.
    """

    kind: Literal["guidance", "json", "regex", "grammar", "lark", "structural_tag"]
    spec: str


class ActionSpace(Protocol):
    """The allowed actions, as far as the engine needs them: one of `choices`, or text that satisfies `constraint`."""

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The legal actions as distinct texts; None if an action is generated text."""
        ...

    @property
    def probs(self) -> Probs | None:
        """Of which choices the decision gives the probability; None leaves it to the engine."""
        ...

    @property
    def constraint(self) -> Constraint | None:
        """The constraint on an action that is generated text; None if any text is allowed."""
        ...

    def parse(self, text: str, finish_reason: str) -> tuple[JsonValue, ParseFailure | None]:
        """Parses a completion's text. Returns the action, or None and the reason why the text is not an action."""
        ...


class History(Protocol):
    """The spans of an episode's committed steps, in the form in which the engine uses them for the next decision."""

    def append(self, step: Step) -> None:
        """Adds a committed step that has an action."""
        ...

    def copy(self) -> Self:
        """Returns a copy that can be changed independently."""
        ...


@immutable
class Transcript:
    """The input of a decision: the system message, the steps so far, and the new observation.

    max_tokens: size of the context in tokens.
    slides: whether the oldest steps may be dropped to make room.
    template: how the parts become the input of an encoder; None for the engine's own template.
    """

    system: str
    history: History
    observation: JsonValue
    max_tokens: int
    slides: bool
    template: str | None = None


@immutable
class ReasoningBudget:
    """Makes the policy draw a thought before each action.

    max_tokens: maximum length of the thought.
    keep: whether later prompts contain it.
    """

    max_tokens: int
    keep: bool


@immutable
class Recorded:
    """An action that the caller chose instead of the policy, and its text."""

    action: JsonValue
    text: str


class TextSink:
    """Receives streamed text. `has_emitted` is true once any text was emitted."""

    def __init__(self, emit: Callable[[StreamKind, str], None]) -> None:
        self._emit = emit
        self.has_emitted = False

    def of(self, kind: StreamKind) -> OnText:
        """Returns a callback that receives text of this kind."""
        return partial(self._receive, kind)

    def _receive(self, kind: StreamKind, delta: str) -> None:
        self.has_emitted = True
        self._emit(kind, delta)


@immutable
class Adapter:
    """A version of a LoRA adapter.

    name: `name@digest`. Two versions never have the same name, because the engine may serve both in one batch.
    version: changes with the adapter's weights and with those of the base model.
    path: its folder, whose files never change.
    """

    name: str
    version: str
    path: str
    rank: int


@immutable
class Wanted:
    """The options of a decision.

    generator: returns the random generator for a purpose. If the episode has a seed, it is seeded for this step.
    slot: returns a context manager to use around each request to the model; see `Slot`.
    reasoning: if set, the policy draws a thought before the action.
    recorded: an action that the caller chose; the policy then draws nothing.
    adapter: the LoRA adapter to use; None for the base model.
    cache_salt: separates the prefix cache of tenants; see `cache_salt`.
    sink: receives streamed text.
    """

    sampling: Sampling
    generator: Callable[[str], random.Random]
    slot: Slot
    reasoning: ReasoningBudget | None = None
    recorded: Recorded | None = None
    adapter: Adapter | None = None
    cache_salt: str | None = None
    sink: TextSink | None = None


@immutable
class Overflow:
    """Returned instead of a decision if the observation and its action do not fit into the context."""


@immutable
class TemplateReport:
    """How the model's chat template behaves.

    append_only: false if the template rewrites earlier turns.
    canonical: false if the template's own tokenization of a conversation differs from that of the token log.
    system_role: false if the instructions are part of the first observation, because there is no system role.
    plain: true if the model has no chat template.
    """

    append_only: bool
    canonical: bool
    system_role: bool
    plain: bool


@immutable
class EngineInfo:
    """The model that an engine serves.

    model: its name for callers.
    version: changes whenever the weights change.
    max_model_len: maximum length of prompt and completion together, in tokens.
    """

    model: str
    version: str
    max_model_len: int
    default_sampling: Sampling
    weight_shapes: Shapes | None = None
    """The shapes that an adapter must fit; None if they are unknown."""
    max_lora_rank: int = 0
    """The largest rank of an adapter; 0 if the engine does not support adapters."""
    num_slots: int = 256
    """Maximum number of requests that the engine processes at the same time."""
    vocab_size: int | None = None
    """Number of tokens that the model has embeddings for; None if unknown."""
    generates: bool = True
    """False for embedding and classification models."""
    no_episodes: str | None = None
    """Why the model serves /v1, but no episodes; None if it serves them."""
    thinks: bool = True
    """Whether the policy can draw a thought before its action."""
    context_template: str | None = None
    """How a transcript becomes the input of an encoder, unless the episode says it; None for decoder-only models."""
    think_tags: tuple[str, str] | None = None
    """The tags around a thought, if the model defines them."""


_SALT_KEY = secrets.token_bytes(32)


def cache_salt(tenant: str) -> str | None:
    """Returns a salt that separates the prefix-cache blocks of tenants; None for the default tenant.

    Without it, the time that a prompt takes would reveal whether another tenant sent the same prompt. The salt is
    secret, because callers of /v1 may choose a salt themselves.
    """
    if tenant == DEFAULT_TENANT:
        return None
    return hashlib.blake2b(tenant.encode(), key=_SALT_KEY, digest_size=16).hexdigest()


CACHE_SALT: ContextVar[str | None] = ContextVar("cache_salt", default=None)
"""The salt of the /v1 request that is being processed. All tenants share the app of /v1."""


SLOT: ContextVar[Slot] = ContextVar("slot", default=nullcontext)
"""How the /v1 request that is being processed waits for a slot."""


class Engine(Protocol):
    """A model that decides on actions. If a call is cancelled, its requests to the model are aborted."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def template(self) -> TemplateReport | None:
        """None if the model serves no episodes, or if it is an encoder-decoder, which has no chat template."""
        ...

    @property
    def healthy(self) -> bool:
        """False once the engine has died. It never becomes true again."""
        ...

    @property
    def heartbeat(self) -> int:
        """A counter that changes with every output of any request and with every answer to `probe`."""
        ...

    def history(self) -> History:
        """Returns an empty history, for an episode without steps."""
        ...

    async def decide(self, transcript: Transcript, space: ActionSpace, wanted: Wanted) -> Decision | Overflow:
        """Decides on an action for the transcript's observation.

        Returns the decision, with exactly the tokens that the model received and drew, or Overflow if they do not fit.
        Raises EngineUnavailable, and ActionSpaceRefused for a space that `check` would refuse.
        """
        ...

    async def check(self, space: ActionSpace) -> None:
        """Checks that `decide` can serve the space: builds or compiles it, within limits of time and memory.

        Raises ActionSpaceRefused, EngineUnavailable.
        """
        ...

    async def watch(self) -> None:
        """Waits until the engine has died. Meanwhile updates its statistics regularly."""
        ...

    async def probe(self) -> None:
        """Makes the engine do a minimal piece of work, to show that it does not hang. Raises EngineUnavailable."""
        ...

    def kill(self) -> None:
        """Kills the engine, even if it hangs. Calls in flight raise EngineUnavailable."""
        ...

    async def load_adapter(self, adapter: Adapter) -> None:
        """Makes the adapter available to `decide`. Raises AdapterRefused, EngineUnavailable.

        The engine may evict it from memory at any time, and then reads its files again when it is used.
        """
        ...

    async def unload_adapter(self, adapter: Adapter) -> None:
        """Frees the adapter's memory. Calls in flight that use it complete, if its files are still there."""
        ...

    def show_adapters(self, names: Mapping[str, Adapter]) -> None:
        """Sets the loaded adapters that callers of /v1 can choose, by their names for callers."""
        ...

    async def openai_app(self) -> ASGIApp | None:
        """Returns the app that serves /v1, created at the first call; None if the engine does not support /v1."""
        ...

    async def close(self) -> None:
        """Releases all resources of the engine, whether it works or has died."""
        ...
