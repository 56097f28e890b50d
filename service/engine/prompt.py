"""Prompt rendering: the pieces of the chat template, found once, and the token ids of a new turn.

At start the template is rendered around markers; the text between two markers is a piece. An episode's prompt is then
`first` + observation + `reply` for step 0, and `closing` + observation + `reply` for each later step. Only the new turn
is ever rendered, so what the policy saw stays as it was. `report` says if the template would have rewritten an earlier
turn, or if the tokenizer would have split the text otherwise.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from service.engine.base import EngineRefused, TemplateReport
from service.engine.tokenizer import Tokenizer
from service.trajectory import JsonValue

Messages = list[dict[str, str]]

# Letters and digits alone: no template trims, escapes or splits them.
_MARKS = {name: f"Zq{name}qZ" for name in ("System", "UserA", "ReplyA", "UserB", "ReplyB", "UserC")}


_THINK_TAGS = ("<think>", "</think>")
"""For a model that has none of its own."""

# Templates of models that think drop it from earlier turns.
_THOUGHT = "<think>\nZqThoughtqZ\n</think>\n\n"


class TemplateError(EngineRefused):
    """The chat template cannot carry an episode. The message says why."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The template's text: before the instructions, between them and the first observation, with no instructions at
    all, between an observation and its reply, and between a reply and the next observation."""

    before_system: str
    after_system: str
    no_system: str
    reply: str
    closing: str


# For a model without a chat template.
_PLAIN = Pieces("", "\n\nObservation: ", "Observation: ", "\nAction:", "\nObservation: ")


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """What stands around a thought, as token ids: `start` opens it (nothing where the template's reply does so), `end`
    closes it, `separator` follows; `silence` tells a model with such tags that there is no thought. Drawing a thought
    ends at one of `stop_token_ids` or, where the tag is no token of its own, at `stop`."""

    start: list[int]
    end: list[int]
    separator: list[int]
    silence: list[int]
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    opened_by_template: bool


class Prompt:
    """Renders turns for one tokenizer and its template; `think_tags` are the model's own, if it has any."""

    def __init__(self, tokenizer: Tokenizer, think_tags: tuple[str, str] | None = None) -> None:
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
        """Token ids of step 0's turn: the system message, the observation, and the opening of the reply and, where the
        policy `thinks` first, of its thought."""
        return self._first_turn(system, observation) + self._opening(thinks=thinks)

    def next_turn(self, observation: JsonValue, *, thinks: bool = False) -> list[int]:
        """Token ids of a later step's turn: what follows the terminator, the observation, the opening of the reply."""
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
        """Neighbouring texts are cut into tokens as one, as the template's own tokenization would."""
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
        """Token ids of a text of ours, the special tokens in it read as such."""
        return self._join(self.tokenizer.split(text))

    def _is_canonical(self) -> bool:
        messages = _conversation(system=self._system_role)
        observations = [m["content"] for m in messages if m["role"] == "user"]
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        ids = self._first_turn(messages[0]["content"] if self._system_role else "", observations[0])
        for reply, observation in zip(replies, observations[1:], strict=True):
            ids += [*self.tokenizer.encode(reply), self.terminator, *self._next_turn(observation)]
        return ids == self.tokenizer.canonical(messages)


def observation_text(observation: JsonValue) -> str:
    """The text the policy reads: a string as it is, parts joined by a line break, anything else as compact JSON."""
    if isinstance(observation, str):
        return observation
    if isinstance(observation, list):
        return "\n".join(part["text"] for part in cast("Messages", observation))
    return json.dumps(observation, ensure_ascii=False, separators=(",", ":"))


def _conversation(*, system: bool) -> Messages:
    roles = [("system", "System")] if system else []
    roles += [("user", "UserA"), ("assistant", "ReplyA"), ("user", "UserB"), ("assistant", "ReplyB"), ("user", "UserC")]
    return [{"role": role, "content": _MARKS[mark]} for role, mark in roles]


def _find_pieces(tokenizer: Tokenizer) -> tuple[Pieces, bool, bool, bool]:
    """The pieces, and whether the model has no template, its template a system role, and is append-only."""
    try:
        bare = _cut(tokenizer, system=False)
    except LookupError:
        return _PLAIN, True, True, True
    try:
        full = _cut(tokenizer, system=True)
    except Exception:  # noqa: BLE001 - a template raises whatever its author chose
        full = None
    append_only = bare[1] == bare[3] and bare[2] == bare[4] and _grows(tokenizer)
    if full is None:
        return Pieces("", "", bare[0], bare[5], bare[2]), False, False, append_only
    return Pieces(full[0], full[1], bare[0], bare[5], bare[2]), False, True, append_only


def _cut(tokenizer: Tokenizer, *, system: bool) -> list[str]:
    """The template's text around each content of a conversation. Raises TemplateError if a content is not there."""
    messages = _conversation(system=system)
    rest = tokenizer.render(messages, add_generation_prompt=True)
    pieces: list[str] = []
    for message in messages:
        before, mark, rest = rest.partition(message["content"])
        if not mark:
            raise TemplateError(f"the chat template does not show the {message['role']}'s words in their order")
        pieces.append(before)
    return [*pieces, rest]


def _grows(tokenizer: Tokenizer) -> bool:
    """Whether each longer conversation begins with the shorter one and its reply, the thinking in a reply included."""
    plain = _conversation(system=False)
    thinking = [{**m, "content": _THOUGHT + m["content"]} if m["role"] == "assistant" else m for m in plain]
    return _keeps(tokenizer, plain) and _keeps(tokenizer, thinking)


def _keeps(tokenizer: Tokenizer, messages: Messages) -> bool:
    texts = [tokenizer.render(messages[:n], add_generation_prompt=True) for n in (1, 3, 5)]
    with_reply = [text + messages[n]["content"] for text, n in zip(texts, (1, 3), strict=False)]
    return all(longer.startswith(shorter) for shorter, longer in zip(with_reply, texts[1:], strict=True))


def _text_terminator(tokenizer: Tokenizer, closing: str) -> int:
    """The token that ends a reply where the template's closing does not start with a special one."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    ids = tokenizer.encode(closing)
    if not ids:
        raise TemplateError("neither the chat template nor the tokenizer says how a reply ends")
    return ids[0]
