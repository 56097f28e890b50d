"""Reads a chat template: renders it with markers as contents, and takes the pieces of text between the markers."""

from dataclasses import dataclass
from typing import cast

from service.engine.tokenizer import Messages, Tokenizer

Conversation = list[dict[str, str]]

# Markers consist of letters only, so that no template trims, escapes or splits them.
_MARKERS = {name: f"Zq{name}qZ" for name in ("System", "UserA", "ReplyA", "UserB", "ReplyB", "UserC")}

# Templates of reasoning models remove such a thought from earlier turns.
_THOUGHT = "<think>\nZqThoughtqZ\n</think>\n\n"


class TemplateError(ValueError):
    """The chat template is not usable for episodes. The message says why."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of the template's text.

    before_system, after_system: before the system message, and between it and the first observation.
    no_system: before the first observation, if there is no system message.
    reply: between an observation and the reply.
    reply_space: whitespace that earlier turns have between `reply` and the reply's text.
    closing: between a reply and the next observation.
    """

    before_system: str
    after_system: str
    no_system: str
    reply: str
    reply_space: str
    closing: str


# The pieces for a model without a chat template.
_PLAIN = Pieces("", "\n\nObservation: ", "Observation: ", "\nAction:", "", "\nObservation: ")


class Template:
    """The chat template of a tokenizer.

    is_plain: whether there is no template.
    has_system_role: whether it renders a system message.
    is_append_only: whether it never changes earlier turns, with or without a thought in the replies.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises TemplateError."""
        self._tokenizer = tokenizer
        self._has_parts = False
        self.is_plain, self.has_system_role, self.is_append_only = True, True, True
        self.pieces = _PLAIN
        try:
            self._read()
        except LookupError:
            return
        except TemplateError:
            self._has_parts = True
            try:
                self._read()
            except TemplateError:
                self._has_parts = False
                self._read()  # its error is about messages as text, which most templates take

    def messages(self, conversation: Conversation) -> Messages:
        """Returns the conversation as the template takes it: the content of a message is a text or a list of parts."""
        if not self._has_parts:
            return cast("Messages", conversation)
        return [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in conversation]

    def _read(self) -> None:
        bare, full = self._try_split(system=False), self._try_split(system=True)
        found = full if isinstance(bare, TemplateError) else bare  # some templates require a system message
        if isinstance(found, TemplateError):
            raise bare if isinstance(bare, TemplateError) else found
        self.is_plain, self.has_system_role = False, not isinstance(full, TemplateError)
        before_system, after_system = ("", "") if isinstance(full, TemplateError) else full[:2]
        no_system = "".join(found[:-5])
        before_a, closing, before_b, closing_b, reply = found[-5:]
        space = before_a.removeprefix(reply) if before_a.startswith(reply) else ""
        space = "" if space.strip() else space
        self.pieces = Pieces(before_system, after_system, no_system, reply, space, closing)
        has_equal_turns = before_a == before_b and closing == closing_b
        self.is_append_only = has_equal_turns and self._extends(conversation(system=found is full))

    def _try_split(self, *, system: bool) -> list[str] | TemplateError:
        try:
            return self._split(conversation(system=system))
        except LookupError:
            raise
        except TemplateError as error:
            return error
        except Exception as error:  # noqa: BLE001 - a template may raise any exception
            return TemplateError(f"the chat template cannot render a conversation: {str(error)[:300]}")

    def _split(self, messages: Conversation) -> list[str]:
        """Renders a conversation of markers. Returns the text before, between and after them. Raises TemplateError if a
        marker is missing or out of order, and whatever the template raises."""
        rest = self._render(messages)
        pieces: list[str] = []
        for message in messages:
            before, marker, rest = rest.partition(message["content"])
            if not marker:
                role = message["role"]
                raise TemplateError(f"the chat template does not render every {role} message unchanged and in order")
            pieces.append(before)
        return [*pieces, rest]

    def _extends(self, plain: Conversation) -> bool:
        """Whether each longer part of the conversation starts with the shorter one and its reply."""
        thinking = [{**m, "content": _THOUGHT + m["content"]} if m["role"] == "assistant" else m for m in plain]
        return self._is_extended(plain) and self._is_extended(thinking)

    def _is_extended(self, messages: Conversation) -> bool:
        first = len(messages) - 4
        texts = [self._render(messages[:n]) for n in (first, first + 2, first + 4)]
        replies = [messages[n]["content"] for n in (first, first + 2)]
        space = self.pieces.reply_space
        return all(
            longer.startswith(shorter + space + reply)
            for shorter, longer, reply in zip(texts, texts[1:], replies, strict=False)
        )

    def _render(self, messages: Conversation) -> str:
        return self._tokenizer.render(self.messages(messages), add_generation_prompt=True)


def conversation(*, system: bool) -> Conversation:
    """Returns a conversation of markers: three observations and two replies, with or without a system message."""
    roles = [("system", "System")] if system else []
    roles += [("user", "UserA"), ("assistant", "ReplyA"), ("user", "UserB"), ("assistant", "ReplyB"), ("user", "UserC")]
    return [{"role": role, "content": _MARKERS[marker]} for role, marker in roles]
