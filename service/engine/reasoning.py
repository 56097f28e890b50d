"""Owns thoughts: reasoning that the policy draws before its action, within a budget."""

from array import array
from dataclasses import dataclass, replace

from service.engine.base import Adapter, Engine, OnText
from service.engine.prompt import Prompt
from service.trajectory import Decision, Sampling, Span, Usage


@dataclass(frozen=True, slots=True)
class Thought:
    """A closed thought: what the policy drew of it, and what was put there to close it.

    dropped: the range that an episode which does not keep thoughts leaves out of later windows, from the span's start.
    """

    text: str
    span: Span
    dropped: tuple[int, int]
    usage: Usage

    def before(self, decision: Decision) -> Decision:
        """The decision that this thought led to, as one completion."""
        acted, usage = decision.completion, decision.usage
        return replace(
            decision,
            completion=Span(
                self.span.token_ids + acted.token_ids,
                self.span.loss_mask + acted.loss_mask,
                self.span.logprobs + acted.logprobs,
            ),
            usage=replace(self.usage, completion_tokens=self.usage.completion_tokens + usage.completion_tokens),
            reasoning=self.text,
            dropped=self.dropped,
        )


async def think(
    engine: Engine,
    prompt: Prompt,
    token_ids: list[int],
    sampling: Sampling,
    *,
    adapter: Adapter | None,
    cache_salt: str | None,
    on_text: OnText | None,
) -> Thought:
    """Draws a thought of at most sampling.max_tokens tokens behind a turn that opened one. Raises EngineUnavailable.

    A policy that ends its turn instead of its thought has its thought closed for it: the token that ended the turn is
    left out, as nothing it draws later could have seen it.
    """
    tags = prompt.think_tags
    sampling = replace(sampling, stop=tags.stop, stop_token_ids=tags.stop_token_ids)
    drawn = await engine.generate(token_ids, sampling, None, adapter=adapter, cache_salt=cache_salt, on_text=on_text)
    is_closed = drawn.finish_reason == "stop" and _has_end(drawn.token_ids, prompt)
    num_kept = len(drawn.token_ids) - (drawn.finish_reason == "stop" and not is_closed)
    forced = [*([] if is_closed else tags.end), *tags.separator]
    num_thought = num_kept - (is_closed and bool(tags.stop_token_ids))
    span = Span(
        array("i", [*drawn.token_ids[:num_kept], *forced]),
        b"\x01" * num_kept + bytes(len(forced)),
        array("f", [*drawn.logprobs[:num_kept], *([0.0] * len(forced))]),
    )
    # Where the template itself opens the thought, each turn keeps an empty one.
    dropped = (0, num_thought) if tags.opened_by_template else (-len(tags.start), len(span.token_ids))
    return Thought(drawn.text.strip(), span, dropped, Usage(len(token_ids), drawn.cached_tokens, num_kept))


def _has_end(token_ids: tuple[int, ...], prompt: Prompt) -> bool:
    tags = prompt.think_tags
    if tags.stop_token_ids:
        return token_ids[-1:] == tags.stop_token_ids
    return any(stop in prompt.tokenizer.decode(token_ids) for stop in tags.stop)
