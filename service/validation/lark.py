"""Builds a context-free grammar in llguidance's dialect of Lark, and asks llguidance about expressions.

A terminal is written as expressions between slashes, combined with `&`, `|` and `~` (complement).
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_MAX_CHARACTERS = 1 << 20
"""Maximum length of all terminals together."""
_MAX_ITEMS = 32_000
"""Maximum number of items of llguidance's parser at one place. Each optional property of an object that may come next
is about three items, and the size of a schema is limited, too."""
_MAX_LINES_ON_STACK = 500
_STACK_BYTES = 512 << 20
"""Memory that is reserved, and only used as needed. It suffices for the largest grammar."""
_stack_lock = threading.Lock()
_CHUNK_BYTES = 1024
"""Number of bytes that a matcher gets at once. llguidance limits its work for each call."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """A rule, repeated from `least` to `most` times; None for no limit."""

    rule: str
    least: int
    most: int | None


Part = str | Repeated
"""The name of a rule or a terminal, or a repetition of a rule."""


class Grammar:
    """Rules and terminals under construction. The names of rules start with `r`, those of terminals with `T`."""

    def __init__(self) -> None:
        self._rules: dict[str, list[list[Part]]] = {}
        self._terminals: dict[str, str] = {}
        self._num_characters = 0

    @property
    def num_rules(self) -> int:
        return len(self._rules)

    def new_rule(self) -> str:
        """Returns the name of a new rule, which derives nothing yet."""
        name = f"r{len(self._rules)}"
        self._rules[name] = []
        return name

    def add(self, rule: str, alternatives: Iterable[list[Part]]) -> None:
        """Adds alternatives to a rule. An empty list of parts derives the empty text."""
        self._rules[rule] += alternatives

    def terminal(self, terminal: str) -> str:
        """Returns the name of a terminal, which must match at least one text that is not empty. Raises ValueError if
        the terminals become too large."""
        if terminal not in self._terminals:
            self._num_characters += len(terminal)
            if self._num_characters > _MAX_CHARACTERS:
                raise ValueError("the schema is too large once it is compiled; use a simpler schema")
            self._terminals[terminal] = f"T{len(self._terminals)}"
        return self._terminals[terminal]

    def derives(self, rule: str) -> bool:
        """Whether a rule derives any text."""
        return rule in self._productive()

    def dead_ends(self, start: str) -> list[str]:
        """Returns the rules that explain why `start` derives no text, from `start` to the last cause."""
        productive, found, pending = self._productive(), dict[str, None](), [start]
        while pending and pending[0] not in found:
            rule = pending[0]
            found[rule] = None
            dead = [[_rule_of(part) for part in parts if not _is_live(part, productive)] for parts in self._rules[rule]]
            pending = [name for name in (dead[0] if dead else ()) if all(name in names for names in dead)]
        return list(found)

    def text(self, start: str) -> str:
        """Returns the grammar with this start rule, which must derive a text."""
        productive = self._productive()
        lines = ["%llguidance {}", f"start: {start}"]
        for name in self._reachable(start, productive):
            alternatives = [self._written(parts, productive) for parts in self._live(name, productive)]
            lines.append(f"{name}: {' | '.join(dict.fromkeys(alternatives))}")
        text = "\n".join(lines)
        used = set(text.split())
        return "\n".join([text, *(f"{name}: {terminal}" for terminal, name in self._terminals.items() if name in used)])

    def _live(self, rule: str, productive: set[str]) -> list[list[Part]]:
        return [parts for parts in self._rules[rule] if all(_is_live(part, productive) for part in parts)]

    def _productive(self) -> set[str]:
        """Returns the rules that derive a text."""
        users: dict[str, list[str]] = {}
        for rule, alternatives in self._rules.items():
            for parts in alternatives:
                for part in parts:
                    users.setdefault(_rule_of(part), []).append(rule)
        productive: set[str] = set()
        pending = list(self._rules)
        while pending:
            rule = pending.pop()
            if rule not in productive and self._live(rule, productive):
                productive.add(rule)
                pending += users.get(rule, ())
        return productive

    def _reachable(self, start: str, productive: set[str]) -> list[str]:
        found, pending = {start: None}, [start]
        while pending:
            for parts in self._live(pending.pop(), productive):
                for part in parts:
                    name = _rule_of(part)
                    if name in productive and name not in found:
                        found[name] = None
                        pending.append(name)
        return list(found)

    @staticmethod
    def _written(parts: list[Part], productive: set[str]) -> str:
        words = [
            part if isinstance(part, str) else _repetition(part) for part in parts if not _is_dropped(part, productive)
        ]
        return " ".join(words) or '""'


def _rule_of(part: Part) -> str:
    return part.rule if isinstance(part, Repeated) else part


def _is_live(part: Part, productive: set[str]) -> bool:
    if isinstance(part, Repeated):
        return part.least == 0 or part.rule in productive
    return not part.startswith("r") or part in productive


def _is_dropped(part: Part, productive: set[str]) -> bool:
    return isinstance(part, Repeated) and (part.most == 0 or part.rule not in productive)


def _repetition(part: Repeated) -> str:
    if part.most is None and part.least <= 1:
        return part.rule + ("+" if part.least else "*")
    return f"{part.rule}{{{part.least},{'' if part.most is None else part.most}}}"


class _Bytes:
    """A tokenizer with one token for each byte."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@lru_cache(maxsize=1)
def byte_tokenizer() -> Any:
    """Returns llguidance's tokenizer with one token for each byte."""
    import llguidance

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


def matcher(grammar: str, tokenizer: Any = None) -> Any:
    """Returns a matcher for a grammar; by default, of bytes. The caller must ask whether it `is_error`."""
    import llguidance

    def made() -> Any:
        return llguidance.LLMatcher(
            tokenizer or byte_tokenizer(),
            llguidance.LLMatcher.grammar_from_lark(grammar),
            log_level=0,
            limits=llguidance.LLParserLimits(max_items_in_row=_MAX_ITEMS, step_max_items=20 * _MAX_ITEMS),
        )

    return made() if grammar.count("\n") < _MAX_LINES_ON_STACK else _on_large_stack(made)


def _on_large_stack(function: Callable[[], Any]) -> Any:
    """Calls a function in a thread with a large stack. llguidance compiles rules by recursion, which takes 3 KiB for
    each rule that refers to the next, and a stack overflow would end the process."""
    with _stack_lock, ThreadPoolExecutor(max_workers=1) as executor:
        size = threading.stack_size(_STACK_BYTES)
        try:
            called = executor.submit(function)
        finally:
            threading.stack_size(size)
        return called.result()


def accepts(matcher: Any, text: str) -> bool:
    """Whether a new matcher of bytes accepts the whole text."""
    data = text.encode()
    chunks = (data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES))
    return all(matcher.consume_tokens(list(chunk)) for chunk in chunks) and matcher.is_accepting()


@lru_cache(maxsize=4096)
def is_empty(terminal: str) -> bool:
    """Whether a terminal matches no text. Raises ValueError if that takes too long."""
    found = matcher(f"start: T\nT: {terminal}")
    found.compute_bitmask()
    if not found.is_error():
        return False
    if found.get_error().startswith("NoExtension"):
        return True
    raise ValueError("the keyword 'pattern', or its combination with other patterns or with lengths, is too complex")
