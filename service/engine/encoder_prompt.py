"""Renders the input of an encoder, which has no chat template: a template says where each part of the transcript goes.

A template is a text with the placeholders `{instructions}` (the system message), `{history}` (the earlier steps) and
`{observation}` (the new one). A template without `{history}` makes the policy stateless.
"""

import re
from collections.abc import Sequence

from service.engine.text_log import Turn
from service.engine.tokenizer import Tokenizer

DEFAULT_TEMPLATE = "{instructions}\n\n{history}Observation: {observation}\nAction:"
_PLACEHOLDER = re.compile(r"\{(instructions|history|observation)\}")


class EncoderPrompt:
    """Renders inputs of the encoder and replies of the decoder for one tokenizer.

    prefix: the ids that each reply begins with: the decoder's start token, and what the model forces after it.
    terminator, stop_token_ids, stop, reply_space: see `service.engine.acting.ReplyFormat`.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: Sequence[int], end_token_ids: Sequence[int]) -> None:
        """`end_token_ids`: the tokens that end a reply; the service itself writes the first one."""
        self.tokenizer = tokenizer
        self.prefix = list(prefix)
        self.terminator = end_token_ids[0]
        self.stop_token_ids = tuple(end_token_ids)
        self.stop: tuple[str, ...] = ()
        # A reply is a text of its own. Some tokenizers put a space before each text.
        adds_space = tokenizer.encode_segment("a", is_first=True) != tokenizer.encode("a")
        self.reply_space = " " if adds_space else ""

    def encode_reply(self, text: str) -> list[int]:
        return self.tokenizer.encode(self.reply_space + text)

    def render(self, template: str, system: str, turns: Sequence[Turn], observation: str) -> list[int]:
        """Returns the ids that the encoder receives."""
        return self.tokenizer.encode_input(rendered(template, system, turns, observation))


def rendered(template: str, system: str, turns: Sequence[Turn], observation: str) -> str:
    """Returns the text that the encoder receives."""
    shown = turns if has_history(template) else ()
    history = "".join(f"Observation: {seen}\nAction: {action}\n" for seen, action in shown)
    parts = {"instructions": system, "history": history, "observation": observation}
    return _PLACEHOLDER.sub(lambda found: parts[found[1]], template).strip()


def has_history(template: str) -> bool:
    """Whether the encoder reads earlier steps."""
    return "{history}" in template
