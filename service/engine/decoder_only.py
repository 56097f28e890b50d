"""Decides with a decoder-only model. The policy first draws a thought, if one is requested, and then an action.

The prompt of a decision is the spans of the window's steps and the new turn. A discrete action is chosen by scoring;
any other action is generated text. The span of a step is its turn, what the policy drew, and the terminator.
"""

import asyncio
import math
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import TypeVar

from cachetools import LRUCache, cachedmethod

from service.engine import supports
from service.engine.base import (
    ActionSpace,
    Adapter,
    Constraint,
    EngineInfo,
    OnText,
    Overflow,
    Recorded,
    TemplateReport,
    Transcript,
    Wanted,
)
from service.engine.completion import Completion, Scores, without_prefix
from service.engine.decision_paths import TriePath, paths
from service.engine.decision_plans import plan
from service.engine.decision_trie import Branch, Chosen, DecisionTrie
from service.engine.prompt import Prompt
from service.engine.reasoning import Thought, closed_thought
from service.engine.template import TemplateError
from service.engine.token_log import TokenLog, closed_span, joined
from service.engine.tokenizer import Tokenizer
from service.errors import PolicyFailed
from service.trajectory import Decision, JsonValue, ParseFailure, Sampling, Span, Usage
from service.values import immutable

T = TypeVar("T")

_NUM_CACHED_TOKENS = 1 << 21
"""Size of the cache of tries, and of the cache of encodings: about 80 MB each."""
_MAX_FAST_CHARS = 1 << 12
"""Actions of up to this length in total are encoded without a thread."""
_MAX_ALL_PROBS = 64
"""Up to this number of legal actions, the probability of each is given unless the action space says otherwise."""


@immutable
class _Reply:
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


class DecoderOnlyEngine(ABC):
    """Base class of engines whose model is decoder-only. A subclass implements the requests to the model."""

    max_candidates: int | None = None
    """Maximum number of candidates of one call of `score`; None for no limit."""
    max_path_candidates: int = 0
    """Maximum number of candidates at each place of `score_path`; 0 if the engine does not support `score_path`."""
    min_temperature: float = 0.0
    """A text with a lower temperature, except 0, is drawn at this one."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer) -> None:
        """If the chat template is not usable for episodes, `info.no_episodes` says why."""
        self.info = info
        self.tokenizer = tokenizer
        try:
            self.prompt = Prompt(tokenizer, info.think_tags)
            self._check_vocabulary()
        except TemplateError as error:
            self.info = replace(info, no_episodes=str(error))
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
    async def score(
        self,
        prompt_token_ids: list[int],
        candidates: Sequence[int],
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
    ) -> Scores:
        """Scores at most `max_candidates` candidates for the next token, in one forward pass. Raises
        EngineUnavailable."""

    async def score_path(
        self,
        prompt_token_ids: list[int],
        path: TriePath,
        *,
        adapter: Adapter | None = None,
        cache_salt: str | None = None,
    ) -> list[Scores] | None:
        """Scores the children of each branch of a path behind the prompt, in one request. Raises EngineUnavailable.

        Returns None if the engine cannot, because it has computed one of these places before.
        """
        raise NotImplementedError

    @abstractmethod
    async def check_constraint(self, constraint: Constraint) -> None:
        """Compiles the constraint off the event loop, within limits of time and memory. Raises ConstraintRefused,
        EngineUnavailable."""

    @property
    def template(self) -> TemplateReport | None:
        return None if self.info.no_episodes else self.prompt.report

    def history(self) -> TokenLog:
        return TokenLog()

    async def check(self, space: ActionSpace) -> None:
        if space.choices is not None:
            await self._built(space.choices)
        elif space.constraint is not None:
            await self.check_constraint(space.constraint)

    async def decide(self, transcript: Transcript, space: ActionSpace, wanted: Wanted) -> Decision | Overflow:
        log = transcript.history
        assert isinstance(log, TokenLog)  # created by `history`
        thinks = wanted.reasoning is not None and wanted.recorded is None
        turn = self._turn(transcript, log, thinks=thinks)
        trie = None if space.choices is None or wanted.recorded else await self._built(space.choices)
        limit = transcript.max_tokens - self._reserve(trie, wanted)
        start = log.fit(len(turn), limit, slides=transcript.slides)
        if start is None:
            return Overflow()
        prompt = log.window(start) + turn
        if not thinks:
            return self._decision(turn, start, await self._draw(prompt, space, trie, wanted), wanted)
        thought = await self._think(prompt, wanted)
        reply = await self._draw([*prompt, *thought.span.token_ids], space, trie, wanted)
        return self._decision(turn, start, reply, wanted, thought)

    def _turn(self, transcript: Transcript, log: TokenLog, *, thinks: bool) -> list[int]:
        if log.num_steps:
            return self.prompt.next_turn(transcript.observation, thinks=thinks)
        return self.prompt.first_turn(transcript.system, transcript.observation, thinks=thinks)

    def _reserve(self, trie: DecisionTrie | None, wanted: Wanted) -> int:
        """Returns the maximum length of the reply in tokens, including its thought and its terminator."""
        if wanted.recorded:
            return len(self.prompt.encode_reply(wanted.recorded.text)) + 1
        tags = self.prompt.think_tags
        thought = wanted.reasoning.max_tokens + len(tags.end) + len(tags.separator) if wanted.reasoning else 0
        reply = trie.max_len if trie else wanted.sampling.max_tokens + 1
        return thought + reply

    async def _think(self, prompt: list[int], wanted: Wanted) -> Thought:
        """Draws a thought. The last turn of the prompt ends with the tag that opens it."""
        assert wanted.reasoning is not None
        tags = self.prompt.think_tags
        sampling = replace(
            _seeded(wanted, "thought"),
            max_tokens=wanted.reasoning.max_tokens,
            stop=tags.stop,
            stop_token_ids=(*tags.stop_token_ids, *self.prompt.stop_token_ids),
        )
        on_text = wanted.sink and wanted.sink.of("reasoning")
        async with wanted.slot():
            drawn = await self.generate(
                prompt, sampling, None, adapter=wanted.adapter, cache_salt=wanted.cache_salt, on_text=on_text
            )
        _check_finite(drawn)
        return closed_thought(self.prompt, len(prompt), drawn, self._text_support(sampling, None))

    async def _draw(self, prompt: list[int], space: ActionSpace, trie: DecisionTrie | None, wanted: Wanted) -> _Reply:
        if wanted.recorded is not None:
            return self._recorded(wanted.recorded)
        if trie is not None:
            return await self._choose(prompt, space, trie, wanted)
        return await self._write(prompt, space, wanted)

    def _recorded(self, recorded: Recorded) -> _Reply:
        """Returns an action that the caller chose, in the tokens of the policy. Its mask is 0: the policy drew none."""
        ids = [*self.prompt.encode_reply(recorded.text), self.prompt.terminator]
        drawn = Span(
            array("i", ids),
            bytes(len(ids)),
            array("f", bytes(4 * len(ids))),
            support=supports.run(len(ids), supports.RECORDED),
        )
        return _Reply(recorded.action, recorded.text, drawn, None, "recorded", Usage())

    async def _choose(self, prompt: list[int], space: ActionSpace, trie: DecisionTrie, wanted: Wanted) -> _Reply:
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
        return _Reply(
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
        scores = await self._score_all(prompt, branches, wanted)
        # -inf is allowed: such an action has the probability 0. NaN and inf make the sum NaN or inf.
        if not all(sum(score.logprobs) < math.inf for score in scores):
            raise PolicyFailed
        return scores

    async def _score_all(self, prompt: list[int], branches: Sequence[Branch], wanted: Wanted) -> list[Scores]:
        """Scores branches with few requests: one for each path if the engine supports it, else one for each branch."""
        if not self.max_path_candidates or len(branches) == 1:
            return await _gather([self._score_branch(prompt, branch, wanted) for branch in branches])
        found = paths(branches)
        scores = await _gather([self._score_path(prompt, path, wanted) for path in found])
        on_path = zip(found, scores, strict=True)
        by_place = {branch.path: one for path, row in on_path for branch, one in zip(path.branches, row, strict=True)}
        return [by_place[branch.path] for branch in branches]

    async def _score_path(self, prompt: list[int], path: TriePath, wanted: Wanted) -> list[Scores]:
        has_room = len(prompt) + len(path.token_ids) < self.info.max_model_len
        if len(path.branches) > 1 and path.num_candidates <= self.max_path_candidates and has_room:
            async with wanted.slot():
                scores = await self.score_path(prompt, path, adapter=wanted.adapter, cache_salt=wanted.cache_salt)
            if scores:
                return scores
        return await _gather([self._score_branch(prompt, branch, wanted) for branch in path.branches])

    async def _score_branch(self, prompt: list[int], branch: Branch, wanted: Wanted) -> Scores:
        size = self.max_candidates or len(branch.children)
        parts = [branch.children[start : start + size] for start in range(0, len(branch.children), size)]
        scores = await _gather([self._score(prompt, branch.path, part, wanted) for part in parts])
        return Scores(tuple(value for score in scores for value in score.logprobs), scores[0].cached_tokens)

    async def _score(self, prompt: list[int], path: Sequence[int], candidates: Sequence[int], wanted: Wanted) -> Scores:
        async with wanted.slot():
            ids = [*prompt, *path] if path else prompt  # only here, because hundreds of branches may wait for a slot
            return await self.score(ids, candidates, adapter=wanted.adapter, cache_salt=wanted.cache_salt)

    async def _write(self, prompt: list[int], space: ActionSpace, wanted: Wanted) -> _Reply:
        """Draws an action that is text, with or without a constraint.

        A constraint holds from the first character to the last. Without one, the text starts after the whitespace that
        the template puts before a reply, and stops where the template ends a reply.
        """
        on_text = wanted.sink and wanted.sink.of("text")
        sampling, space_before = replace(_seeded(wanted, ""), stop_token_ids=self.prompt.stop_token_ids), ""
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
        _check_finite(drawn)
        text = drawn.text.removeprefix(space_before)
        action, failure = space.parse(text, drawn.finish_reason)
        num_drawn = len(drawn.token_ids)
        support = supports.run(num_drawn, self._text_support(sampling, space.constraint))
        return _Reply(
            action=action,
            text=text,
            drawn=Span(array("i", drawn.token_ids), b"\x01" * num_drawn, array("f", drawn.logprobs), support=support),
            logprob=sum(drawn.logprobs),
            finish_reason=drawn.finish_reason,
            usage=Usage(len(prompt), drawn.cached_tokens, num_drawn),
            parse_failure=failure,
        )

    def _text_support(self, sampling: Sampling, constraint: Constraint | None) -> int:
        """Returns what the tokens of a text are drawn among. At temperature 0, filters change nothing."""
        is_filtered = sampling.has_filters and sampling.temperature > 0
        is_raised = 0 < sampling.temperature < self.min_temperature
        return supports.FILTERED if constraint is not None or is_filtered or is_raised else supports.ALL

    def _decision(
        self, turn: list[int], start: int, reply: _Reply, wanted: Wanted, thought: Thought | None = None
    ) -> Decision:
        completion, usage, dropped = reply.drawn, reply.usage, (0, 0)
        if thought is not None:
            completion = joined(thought.span, reply.drawn)
            num_drawn = thought.usage.completion_tokens + usage.completion_tokens
            usage = replace(thought.usage, completion_tokens=num_drawn)
            if wanted.reasoning and not wanted.reasoning.keep:
                dropped = (len(turn) + thought.dropped[0], len(turn) + thought.dropped[1])
        return Decision(
            action=reply.action,
            text=reply.text,
            span=closed_span(turn, completion, self.prompt.terminator),
            window_start=start,
            policy_version=wanted.adapter.version if wanted.adapter else self.info.version,
            logprob=reply.logprob,
            finish_reason=reply.finish_reason,
            usage=usage,
            action_probs=reply.action_probs,
            legal_mass=reply.legal_mass,
            parse_failure=reply.parse_failure,
            reasoning=thought.text if thought else None,
            dropped=dropped,
        )

    def _check_vocabulary(self) -> None:
        """Raises TemplateError if a prompt could contain a token that the model does not have. It would crash vLLM."""
        size = self.info.vocab_size
        highest = max(self.tokenizer.max_token_id, *self.prompt.control_token_ids)
        if size is not None and highest >= size:
            raise TemplateError(
                f"the tokenizer has the token id {highest}, but the model has only {size} embeddings: the tokenizer "
                "belongs to another model, or its added tokens were never added to the model"
            )

    async def _built(self, choices: tuple[str, ...]) -> DecisionTrie:
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


def _seeded(wanted: Wanted, purpose: str) -> Sampling:
    """Returns the sampling with a seed for this step and purpose, if the episode has a seed."""
    if wanted.sampling.seed is None:
        return wanted.sampling
    return replace(wanted.sampling, seed=wanted.generator(purpose).getrandbits(32))


def _check_finite(drawn: Completion) -> None:
    """Raises PolicyFailed if the probability of a token is not a number, or if a token of probability 0 was drawn."""
    if not all(map(math.isfinite, drawn.logprobs)):
        raise PolicyFailed


async def _gather(calls: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """Like asyncio.gather, but if a call fails, the others are cancelled."""
    if len(calls) == 1:  # by far the most frequent case, and faster without a task
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:  # all passes fail for the same reason, so the first one is enough
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]
