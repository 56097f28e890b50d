"""Renders prompts: splits the chat template into pieces once, and makes the token ids of each new turn from them.

When the engine loads, the template is rendered with markers as contents. The pieces are the text between two markers.
The turn of step 0 is the pieces before and after the system message, the observation, and `reply`. Each later turn is
`closing`, the observation, and `reply`. Only the new turn is rendered, so earlier tokens never change. `report` says
whether the template would have rewritten earlier turns, and whether its own tokenization would have been different.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from service.engine.base import EngineRefused, TemplateReport
from service.engine.tokenizer import Tokenizer
from service.trajectory import JsonValue

Messages = list[dict[str, str]]

# Markers consist of letters only, so that no template trims, escapes or splits them.
_MARKERS = {name: f"Zq{name}qZ" for name in ("System", "UserA", "ReplyA", "UserB", "ReplyB", "UserC")}


_THINK_TAGS = ("<think>", "</think>")
"""Tags around a thought, for models that define none."""

# Templates of reasoning models remove such a thought from earlier turns.
_THOUGHT = "<think>\nZqThoughtqZ\n</think>\n\n"


class TemplateError(EngineRefused):
    """The chat template is not usable for episodes. The message says why."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of the template's text.

    before_system, after_system: before the system message, and between it and the first observation.
    no_system: before the first observation, if there is no system message.
    reply: between an observation and the reply.
    closing: between a reply and the next observation.
    """

    before_system: str
    after_system: str
    no_system: str
    reply: str
    closing: str


# The pieces for a model without a chat template.
_PLAIN = Pieces("", "\n\nObservation: ", "Observation: ", "\nAction:", "\nObservation: ")


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
    """Renders turns for one tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer, think_tags: tuple[str, str] | None = None) -> None:
        """`think_tags`: the tags around a thought, if the model defines them. Raises TemplateError."""
        self.tokenizer = tokenizer
        self._pieces, plain, system_role, append_only = _find_pieces(tokenizer)
        self._reply = tokenizer.split(self._pieces.reply)
        closing = tokenizer.split(self._pieces.closing)
        if closing and isinstance(closing[0], int):
            self.terminator, self._after_terminator = closing[0], closing[1:]
        else:
            self.terminator, self._after_terminator = _text_terminator(tokenizer, self._pieces.closing), closing
        self._system_role = system_role
        self.think_tags = self._find_think_tags(think_tags)
        self.report = TemplateReport(append_only, plain or self._is_canonical(), system_role, plain)

    def first_turn(self, system: str, observation: JsonValue, *, thinks: bool = False) -> list[int]:
        """Returns the token ids of step 0's turn: system message, observation, and the start of the reply.

        thinks: whether the policy draws a thought before its action. The reply then starts with an opened thought.
        """
        return self._first_turn(system, observation) + self._opening(thinks=thinks)

    def next_turn(self, observation: JsonValue, *, thinks: bool = False) -> list[int]:
        """Returns the token ids of a later turn: the text after the last terminator, the observation, and the start of
        the reply."""
        return self._next_turn(observation) + self._opening(thinks=thinks)

    def _opening(self, *, thinks: bool) -> list[int]:
        return self.think_tags.start if thinks else self.think_tags.silence

    def _first_turn(self, system: str, observation: JsonValue) -> list[int]:
        pieces = self._pieces
        text = observation_text(observation)
        split = self.tokenizer.split
        if system and self._system_role:
            before = [*split(pieces.before_system), system, *split(pieces.after_system)]
        else:
            before = [*split(pieces.no_system), f"{system}\n\n" if system else ""]
        return self._join([*before, text, *self._reply])

    def _next_turn(self, observation: JsonValue) -> list[int]:
        return self._join([*self._after_terminator, observation_text(observation), *self._reply])

    def _join(self, parts: Sequence[int | str]) -> list[int]:
        """Encodes adjacent texts together, as the template's own tokenization does. Integers are special token ids."""
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            if text:
                ids += self.tokenizer.encode(text)
                text = ""
            ids.append(part)
        return ids + self.tokenizer.encode(text) if text else ids

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
        """Encodes a text with special tokens. The text must not contain text of callers."""
        return self._join(self.tokenizer.split(text))

    def _is_canonical(self) -> bool:
        """Whether turns rendered one by one have the same tokens as the whole conversation rendered by the template."""
        messages = _conversation(system=self._system_role)
        observations = [m["content"] for m in messages if m["role"] == "user"]
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        ids = self._first_turn(messages[0]["content"] if self._system_role else "", observations[0])
        for reply, observation in zip(replies, observations[1:], strict=True):
            ids += [*self.tokenizer.encode(reply), self.terminator, *self._next_turn(observation)]
        return ids == self.tokenizer.canonical(messages)


def observation_text(observation: JsonValue) -> str:
    """Returns an observation as text: a string unchanged, parts joined by line breaks, other values as compact JSON."""
    if isinstance(observation, str):
        return observation
    if isinstance(observation, list):
        return "\n".join(part["text"] for part in cast("Messages", observation))
    return json.dumps(observation, ensure_ascii=False, separators=(",", ":"))


def _conversation(*, system: bool) -> Messages:
    roles = [("system", "System")] if system else []
    roles += [("user", "UserA"), ("assistant", "ReplyA"), ("user", "UserB"), ("assistant", "ReplyB"), ("user", "UserC")]
    return [{"role": role, "content": _MARKERS[marker]} for role, marker in roles]


def _find_pieces(tokenizer: Tokenizer) -> tuple[Pieces, bool, bool, bool]:
    """Returns the pieces, and whether the model has no template (`plain`), has a system role, and is append-only."""
    try:
        bare = _split_template(tokenizer, system=False)
    except LookupError:
        return _PLAIN, True, True, True
    try:
        full = _split_template(tokenizer, system=True)
    except Exception:  # noqa: BLE001 - a template without a system role may raise any exception
        full = None
    append_only = bare[1] == bare[3] and bare[2] == bare[4] and _is_append_only(tokenizer)
    if full is None:
        return Pieces("", "", bare[0], bare[5], bare[2]), False, False, append_only
    return Pieces(full[0], full[1], bare[0], bare[5], bare[2]), False, True, append_only


def _split_template(tokenizer: Tokenizer, *, system: bool) -> list[str]:
    """Renders a conversation of markers. Returns the text before, between and after them.

    Raises TemplateError if a marker is missing or out of order, and whatever the template raises.
    """
    messages = _conversation(system=system)
    rest = tokenizer.render(messages, add_generation_prompt=True)
    pieces: list[str] = []
    for message in messages:
        before, marker, rest = rest.partition(message["content"])
        if not marker:
            role = message["role"]
            raise TemplateError(f"the chat template does not render every {role} message unchanged and in order")
        pieces.append(before)
    return [*pieces, rest]


def _is_append_only(tokenizer: Tokenizer) -> bool:
    """Whether the template never changes earlier turns, with or without a thought in the replies."""
    plain = _conversation(system=False)
    thinking = [{**m, "content": _THOUGHT + m["content"]} if m["role"] == "assistant" else m for m in plain]
    return _extends(tokenizer, plain) and _extends(tokenizer, thinking)


def _extends(tokenizer: Tokenizer, messages: Messages) -> bool:
    """Whether each longer part of the conversation starts with the shorter one and its reply."""
    texts = [tokenizer.render(messages[:n], add_generation_prompt=True) for n in (1, 3, 5)]
    with_reply = [text + messages[n]["content"] for text, n in zip(texts, (1, 3), strict=False)]
    return all(longer.startswith(shorter) for shorter, longer in zip(with_reply, texts[1:], strict=True))


def _text_terminator(tokenizer: Tokenizer, closing: str) -> int:
    """Returns the token that ends a reply, if the template's `closing` piece does not start with a special token."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    ids = tokenizer.encode(closing)
    if not ids:
        raise TemplateError("neither the chat template nor the tokenizer's eos_token defines how a reply ends")
    return ids[0]
