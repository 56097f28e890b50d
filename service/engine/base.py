"""Owns the seam to the engine: the Engine and Tokenizer protocols and the values that cross them."""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol

from starlette.types import ASGIApp

from service.engine.adapters import Shapes
from service.trajectory import DEFAULT_TENANT, Sampling

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a completion must be: JSON valid under `spec` (a schema as JSON text), or text that `spec` matches. The
    other kinds are /v1's: a grammar as EBNF or Lark has it, or xgrammar's structural tag, which is JSON."""

    kind: Literal["json", "regex", "grammar", "lark", "structural_tag"]
    spec: str


class ConstraintRefused(Exception):
    """The engine cannot hold completions to this constraint, or not within its limits; the message says why."""


class EngineUnavailable(Exception):
    """The engine is loading, failed, or is gone."""


class EngineRefused(ValueError):
    """The engine cannot be built from its settings, and time does not mend it; the message says why."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is served. `version` changes whenever the weights do; `max_model_len` is in tokens."""

    model: str
    version: str
    max_model_len: int
    default_sampling: Sampling
    weight_shapes: Shapes | None = None
    """The base model's, where they can be told: what an adapter must fit."""
    max_lora_rank: int = 0
    """0 where the engine takes no adapters."""
    max_num_seqs: int = 256
    """Requests that it batches at once."""
    generates: bool = True
    """False for a model that embeds or classifies: it serves /v1 and no episodes."""
    think_tags: tuple[str, str] | None = None
    """What opens and closes a thought, where the model has such tags of its own."""


@dataclass(frozen=True, slots=True)
class Completion:
    """token_ids: drawn by the policy, end-of-turn included. logprobs: one a token, under the drawing distribution."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """logprobs: of each candidate as the next token, at temperature 1 over the whole vocabulary."""

    logprobs: tuple[float, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in a folder that does not change; `version` names its weights and the base model's."""

    name: str
    version: str
    path: str
    rank: int


_SALT_KEY = secrets.token_bytes(32)


def cache_salt(tenant: str) -> str | None:
    """Keeps a tenant's prefix-cache blocks apart, so that nobody learns by timing what another's prompts begin with.
    Nobody can guess it: /v1 lets callers name a salt. The default tenant has none."""
    if tenant == DEFAULT_TENANT:
        return None
    return hashlib.blake2b(tenant.encode(), key=_SALT_KEY, digest_size=16).hexdigest()


CACHE_SALT: ContextVar[str | None] = ContextVar("cache_salt", default=None)
"""The salt of the /v1 request that is being served: its app belongs to all callers."""


class Tokenizer(Protocol):
    """A Hugging Face tokenizer and its chat template, reduced to what an append-only log needs."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of user text. Never a special token, whatever the text says."""
        ...

    def split(self, text: str) -> list[int | str]:
        """A template's text as its special token ids and the plain text between them."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The chat template's text. Raises whatever the template raises."""
        ...

    def canonical(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The template's own tokenization of a conversation, generation prompt included."""
        ...


class Engine(Protocol):
    """Token ids in, token ids out. Cancelling a call aborts its request."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def healthy(self) -> bool:
        """False for ever once it died."""
        ...

    @property
    def heartbeat(self) -> int:
        """Changes with every sign of life: an output of any request, an answer to `probe`."""
        ...

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: Sampling,
        constraint: Constraint | None,
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
        on_text: OnText | None = None,
    ) -> Completion:
        """Draws a completion, under an adapter if one is given; what it leaves in the prefix cache serves calls of the
        same `cache_salt` alone; `on_text` hears its text as it comes. Raises
        EngineUnavailable."""
        ...

    async def score(
        self,
        prompt_token_ids: list[int],
        candidates: Sequence[int],
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
    ) -> Scores:
        """Scores each candidate as the next token, in one forward pass. Raises EngineUnavailable."""
        ...

    async def check(self, constraint: Constraint) -> None:
        """Compiles the constraint off the event loop under a time limit. Raises ConstraintRefused."""
        ...

    async def matches(self, constraint: Constraint, text: str) -> bool:
        """Whether a completion that the constraint allows could be this text. Raises ConstraintRefused."""
        ...

    async def watch(self) -> None:
        """Returns when the engine has died; flushes its statistics meanwhile."""
        ...

    async def probe(self) -> None:
        """Asks it for one token. Raises EngineUnavailable."""
        ...

    def kill(self) -> None:
        """Ends it at once, even where it hangs: it is dead from now on, and calls in flight raise EngineUnavailable."""
        ...

    async def load_adapter(self, adapter: Adapter) -> None:
        """Acts may be under it from now on. Raises AdapterRefused."""
        ...

    async def unload_adapter(self, adapter: Adapter) -> None:
        """Frees what it takes; calls in flight under it end as they began."""
        ...

    async def inference(self) -> ASGIApp | None:
        """An app that serves /v1 on this engine, made at the first call; None if it has none."""
        ...

    async def close(self) -> None:
        """Frees what it holds, dead or alive."""
        ...
