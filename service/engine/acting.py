"""Draws replies, with a model of either kind: an action that is one of given texts, or generated text.

The prompt of a reply is the tokens that the policy receives before it. A discrete action is chosen by scoring; any
other action is generated.
"""

import asyncio
import math
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache, cachedmethod

from service.engine import supports
from service.engine.base import ActionSpace, Adapter, Constraint, EngineInfo, OnText, Recorded, Wanted
from service.engine.completion import Completion, Scores, without_prefix
from service.engine.decision_plans import plan
from service.engine.decision_trie import Branch, Chosen, DecisionTrie
from service.engine.tokenizer import Tokenizer
from service.errors import PolicyFailed
from service.trajectory import JsonValue, ParseFailure, Sampling, Span, Usage
from service.values import immutable

T = TypeVar("T")

_NUM_CACHED_TOKENS = 1 << 21
"""Size of the cache of tries, and of the cache of encodings: about 80 MB each."""
_MAX_FAST_CHARS = 1 << 12
"""Actions of up to this length in total are encoded without a thread."""
_MAX_ALL_PROBS = 64
"""Up to this number of legal actions, the probability of each is given unless the action space says otherwise."""


class ReplyFormat(Protocol):
    """How the model writes a reply.

    terminator: the token that ends it.
    stop_token_ids, stop: what ends its generation, besides the tokens that the model itself ends with.
    reply_space: whitespace before its text. Its tokens contain it, its text does not.
    """

    terminator: int
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    reply_space: str

    def encode_reply(self, text: str) -> list[int]:
        """Returns the token ids of a reply that the policy did not generate, without the terminator."""
        ...


@immutable
class Reply:
    """An action, drawn or recorded. `drawn` has its tokens, their logprobs, and a mask: 1 if the policy drew it."""

    action: JsonValue
    text: str
    drawn: Span
    logprob: float | None
    finish_reason: str
    usage: Usage
    action_probs: dict[str, float] | None = None
    legal_mass: float | None = None
    parse_failure: ParseFailure | None = None


Format = TypeVar("Format", bound=ReplyFormat)


class ActingEngine(ABC, Generic[Format]):
    """Base class of engines. A subclass knows how its kind of model receives a transcript."""

    min_temperature: float = 0.0
    """A text with a lower temperature, except 0, is drawn at this one."""
    prompt: Format

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._encodings = LRUCache[str, list[int]](_NUM_CACHED_TOKENS, getsizeof=len)
        self._tries = LRUCache[tuple[str, ...], DecisionTrie](
            _NUM_CACHED_TOKENS, getsizeof=lambda trie: trie.num_tokens
        )
        self._cache_lock = threading.Lock()
        self._building = asyncio.Lock()

    @abstractmethod
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
        """Draws a completion. Raises EngineUnavailable.

        constraint: the completion satisfies it; None for any text.
        cache_salt: only calls with the same salt share the prefix cache.
        on_text: receives the text piece by piece while it is generated.
        """

    @abstractmethod
    async def score_all(self, prompt: list[int], branches: Sequence[Branch], wanted: Wanted) -> list[Scores]:
        """Scores the children of branches of a trie behind the prompt, with few requests. Raises EngineUnavailable."""

    @abstractmethod
    async def check_constraint(self, constraint: Constraint) -> None:
        """Compiles the constraint off the event loop, within limits of time and memory. Raises ConstraintRefused,
        EngineUnavailable."""

    async def check(self, space: ActionSpace) -> None:
        if space.choices is not None:
            await self.built(space.choices)
        elif space.constraint is not None:
            await self.check_constraint(space.constraint)

    async def draw(self, prompt: list[int], space: ActionSpace, trie: DecisionTrie | None, wanted: Wanted) -> Reply:
        """Returns a reply behind the prompt. `trie`: that of the choices if the policy chooses one of them."""
        if wanted.recorded is not None:
            return self._recorded(wanted.recorded)
        if trie is not None:
            return await self._choose(prompt, space, trie, wanted)
        return await self._write(prompt, space, wanted)

    def _recorded(self, recorded: Recorded) -> Reply:
        """Returns an action that the caller chose, in the tokens of the policy. Its mask is 0: the policy drew none."""
        ids = [*self.prompt.encode_reply(recorded.text), self.prompt.terminator]
        drawn = Span(
            array("i", ids),
            bytes(len(ids)),
            array("f", bytes(4 * len(ids))),
            support=supports.run(len(ids), supports.RECORDED),
        )
        return Reply(recorded.action, recorded.text, drawn, None, "recorded", Usage())

    async def _choose(self, prompt: list[int], space: ActionSpace, trie: DecisionTrie, wanted: Wanted) -> Reply:
        """Chooses one of the actions. If their first tokens are distinct, this takes one forward pass."""
        choices = space.choices or trie.actions
        all_probs = len(choices) <= _MAX_ALL_PROBS if space.probs is None else space.probs == "all"
        steps = plan(trie, wanted.sampling, wanted.generator(""), all_probs=all_probs)
        first: Scores | None = None  # of the root
        try:
            branches = next(steps)
            while True:
                scores = await self._score_branches(prompt, branches, wanted)
                first = first or scores[0]
                branches = steps.send([score.logprobs for score in scores])
        except StopIteration as end:
            chosen: Chosen = end.value
        action, failure = space.parse(chosen.action, "stop")
        return Reply(
            action=action,
            text=chosen.action,
            drawn=Span(array("i", chosen.token_ids), chosen.drawn, array("f", chosen.logprobs), support=chosen.support),
            logprob=chosen.logprob,
            finish_reason="stop",
            usage=Usage(len(prompt), first.cached_tokens if first else 0, len(chosen.token_ids)),
            action_probs={choice: chosen.probs[choice] for choice in choices if choice in chosen.probs},
            legal_mass=min(sum(map(math.exp, first.logprobs)), 1.0) if first else None,
            parse_failure=failure,
        )

    async def _score_branches(self, prompt: list[int], branches: Sequence[Branch], wanted: Wanted) -> list[Scores]:
        """Raises PolicyFailed if a score is not a number."""
        scores = await self.score_all(prompt, branches, wanted)
        # -inf is allowed: such an action has the probability 0. NaN and inf make the sum NaN or inf.
        if not all(sum(score.logprobs) < math.inf for score in scores):
            raise PolicyFailed
        return scores

    async def _write(self, prompt: list[int], space: ActionSpace, wanted: Wanted) -> Reply:
        """Draws an action that is text, with or without a constraint.

        A constraint holds from the first character to the last. Without one, the text starts after the whitespace that
        the template puts before a reply, and stops where the template ends a reply.
        """
        on_text = wanted.sink and wanted.sink.of("text")
        sampling, space_before = replace(seeded(wanted, ""), stop_token_ids=self.prompt.stop_token_ids), ""
        if space.constraint is None:
            sampling = replace(sampling, stop=sampling.stop + self.prompt.stop)
            space_before = self.prompt.reply_space
        async with wanted.slot():
            drawn = await self.generate(
                prompt,
                sampling,
                space.constraint,
                adapter=wanted.adapter,
                cache_salt=wanted.cache_salt,
                on_text=on_text and without_prefix(on_text, space_before),
            )
        check_finite(drawn)
        text = drawn.text.removeprefix(space_before)
        action, failure = space.parse(text, drawn.finish_reason)
        num_drawn = len(drawn.token_ids)
        support = supports.run(num_drawn, self.text_support(sampling, space.constraint))
        return Reply(
            action=action,
            text=text,
            drawn=Span(array("i", drawn.token_ids), b"\x01" * num_drawn, array("f", drawn.logprobs), support=support),
            logprob=sum(drawn.logprobs),
            finish_reason=drawn.finish_reason,
            usage=Usage(len(prompt), drawn.cached_tokens, num_drawn),
            parse_failure=failure,
        )

    def text_support(self, sampling: Sampling, constraint: Constraint | None) -> int:
        """Returns what the tokens of a text are drawn among. At temperature 0, filters change nothing."""
        is_filtered = sampling.has_filters and sampling.temperature > 0
        is_raised = 0 < sampling.temperature < self.min_temperature
        return supports.FILTERED if constraint is not None or is_filtered or is_raised else supports.ALL

    async def built(self, choices: tuple[str, ...]) -> DecisionTrie:
        """Like `trie`. Long actions are encoded in a thread, one action space at a time, so that other acts go on."""
        if choices in self._tries or sum(map(len, choices)) <= _MAX_FAST_CHARS:
            return self.trie(choices)
        async with self._building:
            return await asyncio.to_thread(self.trie, choices)

    @cachedmethod(lambda self: self._tries, lock=lambda self: self._cache_lock)
    def trie(self, choices: tuple[str, ...]) -> DecisionTrie:
        """Returns the trie of these actions. Raises ActionSpaceRefused."""
        return DecisionTrie(choices, self._encode_choice, self.prompt.terminator)

    @cachedmethod(lambda self: self._encodings, lock=lambda self: self._cache_lock)
    def _encode_choice(self, choice: str) -> list[int]:
        """The encoding is cached, because the legal actions of an act are often new combinations of known actions."""
        return self.prompt.encode_reply(choice)


def seeded(wanted: Wanted, purpose: str) -> Sampling:
    """Returns the sampling with a seed for this step and purpose, if the episode has a seed."""
    if wanted.sampling.seed is None:
        return wanted.sampling
    return replace(wanted.sampling, seed=wanted.generator(purpose).getrandbits(32))


def check_finite(drawn: Completion) -> None:
    """Raises PolicyFailed if the probability of a token is not a number, or if a token of probability 0 was drawn."""
    if not all(map(math.isfinite, drawn.logprobs)):
        raise PolicyFailed


async def gather(calls: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """Like asyncio.gather, but if a call fails, the others are cancelled."""
    if len(calls) == 1:  # by far the most frequent case, and faster without a task
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:  # all passes fail for the same reason, so the first one is enough
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]
