"""Decides with an encoder-decoder model. The encoder reads the transcript, and the decoder writes the action.

The prompt of a decision is what the encoder receives: the window of the transcript, rendered as one text. The span of a
step is the decoder's start token, what the policy drew, and the terminator, beside the encoder's ids.
"""

from abc import abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from service.engine.acting import ActingEngine, Reply
from service.engine.base import ActionSpace, Adapter, EngineInfo, Overflow, TemplateReport, Transcript, Wanted
from service.engine.completion import Scores
from service.engine.decision_trie import Branch
from service.engine.encoder_prompt import DEFAULT_TEMPLATE, EncoderPrompt, has_history
from service.engine.prompt import observation_text
from service.engine.text_log import TextLog
from service.engine.token_log import closed_span
from service.engine.tokenizer import Tokenizer
from service.trajectory import Decision


class EncoderDecoderEngine(ActingEngine[EncoderPrompt]):
    """Base class of engines whose model is an encoder-decoder. A subclass implements the requests to the model.

    max_reply_tokens: maximum length of a reply in tokens, without the decoder's prefix.
    """

    template: TemplateReport | None = None

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer, prompt: EncoderPrompt, max_reply_tokens: int) -> None:
        super().__init__(replace(info, thinks=False, context_template=DEFAULT_TEMPLATE), tokenizer)
        self.prompt = prompt
        self.max_reply_tokens = max_reply_tokens

    @abstractmethod
    async def score(
        self, encoder_token_ids: list[int], branches: Sequence[Branch], *, adapter: Adapter | None = None
    ) -> list[Scores]:
        """Scores the children of each branch, in one pass of the encoder. Raises EngineUnavailable."""

    def history(self) -> TextLog:
        return TextLog()

    async def decide(self, transcript: Transcript, space: ActionSpace, wanted: Wanted) -> Decision | Overflow:
        log = transcript.history
        assert isinstance(log, TextLog)  # created by `history`
        trie = None if space.choices is None or wanted.recorded else await self.built(space.choices)
        fitting = self._fit(transcript, log)
        if fitting is None or (trie and trie.max_len > self.max_reply_tokens):
            return Overflow()
        start, prompt = fitting
        reply = await self.draw(prompt, space, trie, wanted)
        return self._decision(prompt, start, reply, wanted)

    async def score_all(self, prompt: list[int], branches: Sequence[Branch], wanted: Wanted) -> list[Scores]:
        async with wanted.slot():
            return await self.score(prompt, branches, adapter=wanted.adapter)

    def _fit(self, transcript: Transcript, log: TextLog) -> tuple[int, list[int]] | None:
        """Returns the first step of the longest window that fits, and what the encoder receives; None if none fits."""
        template = transcript.template or DEFAULT_TEMPLATE
        observation = observation_text(transcript.observation)

        def rendered(start: int) -> list[int]:
            return self.prompt.render(template, transcript.system, log.window(start), observation)

        starts = range(log.start, max(log.num_steps, log.start) + 1)
        if not (transcript.slides and has_history(template)):
            starts = starts[:1]
        place = 0
        if len(ids := rendered(starts[0])) > transcript.max_tokens:
            place = bisect_left(starts, True, lo=1, key=lambda start: len(rendered(start)) <= transcript.max_tokens)
            if place == len(starts):
                return None
            ids = rendered(starts[place])
        return starts[place], ids

    def _decision(self, prompt: list[int], start: int, reply: Reply, wanted: Wanted) -> Decision:
        span = closed_span(self.prompt.prefix, reply.drawn, self.prompt.terminator)
        return Decision(
            action=reply.action,
            text=reply.text,
            span=replace(span, encoder_token_ids=array("i", prompt)),
            window_start=start,
            policy_version=wanted.adapter.version if wanted.adapter else self.info.version,
            logprob=reply.logprob,
            finish_reason=reply.finish_reason,
            usage=reply.usage,
            action_probs=reply.action_probs,
            legal_mass=reply.legal_mass,
            parse_failure=reply.parse_failure,
        )
