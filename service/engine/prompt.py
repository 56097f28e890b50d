"""Renders prompts: makes the token ids of each new turn from the pieces of the chat template.

The turn of step 0 is the pieces before and after the system message, the observation, and `reply`. Each later turn is
`closing`, the observation, and `reply`. Only the new turn is rendered, so earlier tokens never change. `report` says
whether the template would have rewritten earlier turns, and whether its own tokenization would have been different.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from service.engine.base import TemplateReport
from service.engine.template import Template, TemplateError, conversation
from service.engine.tokenizer import Tokenizer
from service.trajectory import JsonValue, is_parts

_THINK_TAGS = ("<think>", "</think>")
"""Tags around a thought, for models that define none."""


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """The token ids around a thought, and what stops its generation.

    start: opens a thought. Empty if the template's `reply` piece already does so.
    end: closes a thought.
    separator: follows a closed thought.
    silence: an empty thought, which makes a reasoning model act without thinking. Empty for other models.
    stop_token_ids: stop the generation of a thought. Empty if the end tag is not a single token.
    stop: stop strings for that case.
    opened_by_template: whether the template's `reply` piece opens a thought.
    """

    start: list[int]
    end: list[int]
    separator: list[int]
    silence: list[int]
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    opened_by_template: bool


class Prompt:
    """Renders turns for one tokenizer and its chat template.

    terminator: the token that ends a reply.
    stop_token_ids, stop: what ends the generation of a reply, besides the tokens that the model itself ends with.
    reply_space: whitespace between a turn and the text of its reply. The reply's tokens contain it, its text does not.
    """

    def __init__(self, tokenizer: Tokenizer, think_tags: tuple[str, str] | None = None) -> None:
        """`think_tags`: the tags around a thought, if the model defines them. Raises TemplateError."""
        self.tokenizer = tokenizer
        self._template = template = Template(tokenizer)
        self._pieces = template.pieces
        self._reply = tokenizer.split(self._pieces.reply)
        self.reply_space = self._find_reply_space()
        self.terminator, self._after_terminator = self._find_terminator()
        self.stop_token_ids = (self.terminator,)
        self.stop: tuple[str, ...] = ()
        if self._after_terminator is None:  # the reply ends with text
            self._after_terminator = tokenizer.split(self._pieces.closing)
            self.stop_token_ids, self.stop = (), _first_line(self._pieces.closing)
        self.think_tags = self._find_think_tags(think_tags)
        is_canonical = template.is_plain or self._is_canonical()
        self.report = TemplateReport(template.is_append_only, is_canonical, template.has_system_role, template.is_plain)

    def first_turn(self, system: str, observation: JsonValue, *, thinks: bool = False) -> list[int]:
        """Returns the token ids of step 0's turn: system message, observation, and the start of the reply.

        thinks: whether the policy draws a thought before its action. The reply then starts with an opened thought.
        """
        return self._first_turn(system, observation) + self._opening(thinks=thinks)

    def next_turn(self, observation: JsonValue, *, thinks: bool = False) -> list[int]:
        """Returns the token ids of a later turn: the text after the last terminator, the observation, and the start of
        the reply."""
        return self._next_turn(observation) + self._opening(thinks=thinks)

    @property
    def control_token_ids(self) -> list[int]:
        """The control tokens that prompts contain, and those that end a reply or a thought."""
        control = set(self.tokenizer.control_tokens.values())
        tags = self.think_tags
        used = [*self.first_turn("a", "b"), *self.first_turn("", "b"), *self.next_turn("b"), *tags.start, *tags.end]
        return [self.terminator, *(token for token in used if token in control)]

    def encode_reply(self, text: str) -> list[int]:
        """Returns the token ids of a reply that the policy did not generate, as the template encodes them."""
        return self.tokenizer.encode(self.reply_space + text)

    def _opening(self, *, thinks: bool) -> list[int]:
        return self.think_tags.start if thinks else self.think_tags.silence

    def _first_turn(self, system: str, observation: JsonValue) -> list[int]:
        pieces = self._pieces
        text = observation_text(observation)
        split = self.tokenizer.split
        if system and self._template.has_system_role:
            before = [*split(pieces.before_system), system, *split(pieces.after_system)]
        else:
            before = [*split(pieces.no_system), f"{system}\n\n" if system else ""]
        bos = self.tokenizer.bos_token_ids if self._template.is_plain else []
        return bos + self._join([*before, text, *self._reply], is_first=True)

    def _next_turn(self, observation: JsonValue) -> list[int]:
        return self._join([*(self._after_terminator or []), observation_text(observation), *self._reply])

    def _join(self, parts: Sequence[int | str], *, is_first: bool = False) -> list[int]:
        """Encodes adjacent texts together, as the template's own tokenization does. Integers are control tokens.

        is_first: whether these are the first parts of a prompt.
        """
        ids: list[int] = []
        text = ""
        for part in [*parts, None]:
            if isinstance(part, str):
                text += part
                continue
            if text:
                ids += self.tokenizer.encode_segment(text, is_first=is_first and not ids)
                text = ""
            if part is not None:
                ids.append(part)
        return ids

    def _find_reply_space(self) -> str:
        if self._pieces.reply_space or not self._reply or isinstance(self._reply[-1], str):
            return self._pieces.reply_space
        # The reply follows a control token, after which some tokenizers put a space.
        adds_space = self.tokenizer.encode_segment("a", is_first=False) != self.tokenizer.encode("a")
        return " " if adds_space else ""

    def _find_terminator(self) -> tuple[int, list[int | str] | None]:
        """Returns the token that ends a reply, and the parts of `closing` after it; None if a reply ends with text."""
        tokenizer, closing = self.tokenizer, self._pieces.closing
        parts = tokenizer.split(closing)
        for place, part in enumerate(parts[:2]):
            if isinstance(part, int):
                return part, parts[place + 1 :]
            if part.strip():
                break
        if tokenizer.eos_token_id is not None:
            return tokenizer.eos_token_id, None
        ids = tokenizer.encode(closing)
        if not ids:
            raise TemplateError("neither the chat template nor the tokenizer's eos_token defines how a reply ends")
        return ids[0], None

    def _find_think_tags(self, own: tuple[str, str] | None) -> ThinkTags:
        start, end = own or _THINK_TAGS
        opened = self._pieces.reply.rstrip().endswith(start)
        end_parts = self.tokenizer.split(end)
        is_token = len(end_parts) == 1 and isinstance(end_parts[0], int)
        silence = f"\n{end}\n\n" if opened else f"{start}\n\n{end}\n\n" if own else ""
        return ThinkTags(
            start=[] if opened else self._ids(f"{start}\n"),
            end=self._ids(end),
            separator=self._ids("\n\n"),
            silence=self._ids(silence),
            stop_token_ids=tuple(part for part in end_parts if isinstance(part, int)) if is_token else (),
            stop=() if is_token else (end,),
            opened_by_template=opened,
        )

    def _ids(self, text: str) -> list[int]:
        """Encodes a text with control tokens. The text must not contain text of callers."""
        ids: list[int] = []
        for part in self.tokenizer.split(text):
            ids += self.tokenizer.encode(part) if isinstance(part, str) else [part]
        return ids

    def _is_canonical(self) -> bool:
        """Whether turns rendered one by one have the same tokens as the whole conversation rendered by the template."""
        has_system = self._template.has_system_role
        messages = conversation(system=has_system)
        observations = [m["content"] for m in messages if m["role"] == "user"]
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        ids = self._first_turn(messages[0]["content"] if has_system else "", observations[0])
        for reply, observation in zip(replies, observations[1:], strict=True):
            ids += [*self.encode_reply(reply), self.terminator, *self._next_turn(observation)]
        return ids == self.tokenizer.canonical(self._template.messages(messages))


def observation_text(observation: JsonValue) -> str:
    """Returns an observation as text: a string unchanged, parts joined by line breaks, other values as compact JSON."""
    if isinstance(observation, str):
        return observation
    if is_parts(observation):
        return "\n".join(part["text"] for part in cast("list[dict[str, str]]", observation))
    return json.dumps(observation, ensure_ascii=False, separators=(",", ":"))


def _first_line(closing: str) -> tuple[str, ...]:
    """Returns the stop string for a reply that ends with text: the text up to the end of its first line."""
    found = re.match(r"\s*\S[^\n]*", closing)
    return (found[0].rstrip(),) if found else ()
