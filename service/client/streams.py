"""Owns the reading of streams: server-sent events of an act, and lines of an export."""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from service.client.errors import ConnectionFailed, problem_of
from service.client.models import Act

T_co = TypeVar("T_co", covariant=True)


class Reader(Protocol[T_co]):
    """Makes values of a stream's bytes, however they are cut."""

    def feed(self, chunk: bytes) -> Iterator[T_co]:
        """The values that end in this chunk. Raises ValueError, KeyError, TypeError for what is none."""
        ...

    def end(self) -> None:
        """Raises ConnectionFailed if the stream ended before it should."""
        ...


@dataclass(frozen=True, slots=True)
class Delta:
    """What the policy wrote since the last one: of its reasoning, or of its text."""

    kind: Literal["reasoning", "text"]
    text: str


Event = Delta | Act
"""An act's stream: deltas, and the act itself at the end."""


class EventReader:
    """Makes events of the bytes of a text/event-stream (WHATWG HTML, 9.2.6), however they are cut."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._rest = ""
        self._kind = ""
        self._data: list[str] = []
        self.complete = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Raises the ApiError of an `error` event."""
        *lines, self._rest = (self._rest + self._decode(chunk)).split("\n")
        for line in lines:
            yield from self._line(line.removesuffix("\r"))

    def end(self) -> None:
        """Raises ConnectionFailed unless the act came: making it again with the same arguments is safe."""
        if not self.complete:
            raise ConnectionFailed("the stream ended before the act")

    def _line(self, line: str) -> Generator[Event]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line and name == "event":
            self._kind = value
        elif line and name == "data":
            self._data.append(value)
        elif not line and self._data:
            kind, data = self._kind, "\n".join(self._data)
            self._kind, self._data = "", []
            yield from self._event(kind, data)

    def _event(self, kind: str, data: str) -> Generator[Event]:
        if kind == "act":
            self.complete = True
            yield Act.model_validate_json(data)
        elif kind == "reasoning" or kind == "text":
            yield Delta(kind, json.loads(data)["delta"])
        elif kind == "error":
            document: dict[str, Any] = json.loads(data)
            raise problem_of(int(document["status"]), document, None)


class LineReader:
    """Makes documents of NDJSON, a line each; only a line feed ends a line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def end(self) -> None:
        if self._rest:
            raise ConnectionFailed("the stream ended within a line")
