"""Thoughts: reasoning that the policy draws before its action, with a maximum number of tokens."""

from array import array
from dataclasses import dataclass

from service.engine import supports
from service.engine.completion import Completion
from service.engine.prompt import Prompt
from service.trajectory import Span, Usage


@dataclass(frozen=True, slots=True)
class Thought:
    """A closed thought.

    span: the tokens that the policy drew, and the tokens that were added to close the thought.
    dropped: the range that later windows leave out if the episode does not keep thoughts, relative to the start of
    `span`. It starts at a negative index if it includes the opening tag.
    usage: the tokens of the request that drew the thought.
    """

    text: str
    span: Span
    dropped: tuple[int, int]
    usage: Usage


def closed_thought(prompt: Prompt, num_prompt_tokens: int, drawn: Completion, support: int) -> Thought:
    """Makes a thought of a completion, and closes it if the policy did not. `support` is the kind of its tokens.

    If the policy ended its turn instead of its thought, the token that ended the turn is removed, because the action
    must not be drawn after the end of a turn.
    """
    tags = prompt.think_tags
    is_closed = drawn.finish_reason == "stop" and _has_end(drawn.token_ids, prompt)
    num_kept = len(drawn.token_ids) - (drawn.finish_reason == "stop" and not is_closed)
    forced = [*([] if is_closed else tags.end), *tags.separator]
    num_thought = num_kept - (is_closed and bool(tags.stop_token_ids))
    span = Span(
        array("i", [*drawn.token_ids[:num_kept], *forced]),
        b"\x01" * num_kept + bytes(len(forced)),
        array("f", [*drawn.logprobs[:num_kept], *([0.0] * len(forced))]),
        support=supports.run(num_kept, support) + supports.run(len(forced), supports.NOT_DRAWN),
    )
    # If the template opens a thought in every reply, only the text is dropped, and an empty thought remains.
    dropped = (0, num_thought) if tags.opened_by_template else (-len(tags.start), len(span.token_ids))
    return Thought(drawn.text.strip(), span, dropped, Usage(num_prompt_tokens, drawn.cached_tokens, num_kept))


def _has_end(token_ids: tuple[int, ...], prompt: Prompt) -> bool:
    tags = prompt.think_tags
    if tags.stop_token_ids:
        return token_ids[-1:] == tags.stop_token_ids
    return any(stop in prompt.tokenizer.decode(token_ids) for stop in tags.stop)
