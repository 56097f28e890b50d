"""Decides with a decoder-only model. The policy first draws a thought, if one is requested, and then an action.

The prompt of a decision is the spans of the window's steps and the new turn. A discrete action is chosen by scoring;
any other action is generated text. The span of a step is its turn, what the policy drew, and the terminator.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from service.engine.acting import ActingEngine, Reply, check_finite, gather, seeded
from service.engine.base import ActionSpace, Adapter, EngineInfo, Overflow, TemplateReport, Transcript, Wanted
from service.engine.completion import Scores
from service.engine.decision_paths import TriePath, paths
from service.engine.decision_trie import Branch, DecisionTrie
from service.engine.prompt import Prompt
from service.engine.reasoning import Thought, closed_thought
from service.engine.template import TemplateError
from service.engine.token_log import TokenLog, closed_span, joined
from service.engine.tokenizer import Tokenizer
from service.trajectory import Decision


class DecoderOnlyEngine(ActingEngine[Prompt]):
    """Base class of engines whose model is decoder-only. A subclass implements the requests to the model."""

    max_candidates: int | None = None
    """Maximum number of candidates of one call of `score`; None for no limit."""
    max_path_candidates: int = 0
    """Maximum number of candidates at each place of `score_path`; 0 if the engine does not support `score_path`."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer) -> None:
        """If the chat template is not usable for episodes, `info.no_episodes` says why."""
        super().__init__(info, tokenizer)
        try:
            self.prompt = Prompt(tokenizer, info.think_tags)
            self._check_vocabulary()
        except TemplateError as error:
            self.info = replace(info, no_episodes=str(error))

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

    @property
    def template(self) -> TemplateReport | None:
        return None if self.info.no_episodes else self.prompt.report

    def history(self) -> TokenLog:
        return TokenLog()

    async def decide(self, transcript: Transcript, space: ActionSpace, wanted: Wanted) -> Decision | Overflow:
        log = transcript.history
        assert isinstance(log, TokenLog)  # created by `history`
        thinks = wanted.reasoning is not None and wanted.recorded is None
        turn = self._turn(transcript, log, thinks=thinks)
        trie = None if space.choices is None or wanted.recorded else await self.built(space.choices)
        limit = transcript.max_tokens - self._reserve(trie, wanted)
        start = log.fit(len(turn), limit, slides=transcript.slides)
        if start is None:
            return Overflow()
        prompt = log.window(start) + turn
        if not thinks:
            return self._decision(turn, start, await self.draw(prompt, space, trie, wanted), wanted)
        thought = await self._think(prompt, wanted)
        reply = await self.draw([*prompt, *thought.span.token_ids], space, trie, wanted)
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
            seeded(wanted, "thought"),
            max_tokens=wanted.reasoning.max_tokens,
            stop=tags.stop,
            stop_token_ids=(*tags.stop_token_ids, *self.prompt.stop_token_ids),
        )
        on_text = wanted.sink and wanted.sink.of("reasoning")
        async with wanted.slot():
            drawn = await self.generate(
                prompt, sampling, None, adapter=wanted.adapter, cache_salt=wanted.cache_salt, on_text=on_text
            )
        check_finite(drawn)
        return closed_thought(self.prompt, len(prompt), drawn, self.text_support(sampling, None))

    async def score_all(self, prompt: list[int], branches: Sequence[Branch], wanted: Wanted) -> list[Scores]:
        """Scores branches with few requests: one for each path if the engine supports it, else one for each branch."""
        if not self.max_path_candidates or len(branches) == 1:
            return await gather([self._score_branch(prompt, branch, wanted) for branch in branches])
        found = paths(branches)
        scores = await gather([self._score_path(prompt, path, wanted) for path in found])
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
        return await gather([self._score_branch(prompt, branch, wanted) for branch in path.branches])

    async def _score_branch(self, prompt: list[int], branch: Branch, wanted: Wanted) -> Scores:
        size = self.max_candidates or len(branch.children)
        parts = [branch.children[start : start + size] for start in range(0, len(branch.children), size)]
        scores = await gather([self._score(prompt, branch.path, part, wanted) for part in parts])
        return Scores(tuple(value for score in scores for value in score.logprobs), scores[0].cached_tokens)

    async def _score(self, prompt: list[int], path: Sequence[int], candidates: Sequence[int], wanted: Wanted) -> Scores:
        async with wanted.slot():
            ids = [*prompt, *path] if path else prompt  # only here, because hundreds of branches may wait for a slot
            return await self.score(ids, candidates, adapter=wanted.adapter, cache_salt=wanted.cache_salt)

    def _decision(
        self, turn: list[int], start: int, reply: Reply, wanted: Wanted, thought: Thought | None = None
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
