"""Incremental parsers of streamed responses: the server-sent events of an act and the NDJSON lines of an export."""

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
    """Parses a stream of bytes that arrives in chunks of any size."""

    def feed(self, chunk: bytes) -> Iterator[T_co]:
        """Yields the values that are complete with this chunk. Raises ValueError, KeyError or TypeError if invalid."""
        ...

    def end(self) -> None:
        """Called at the end of the stream. Raises ConnectionFailed if it is incomplete."""
        ...


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that the policy generated since the previous delta, of its reasoning or of its action."""

    kind: Literal["reasoning", "text"]
    text: str


Event = Delta | Act
"""An item of an act's stream: any number of deltas, then the act."""


class EventReader:
    """Parses a text/event-stream (WHATWG HTML, 9.2.6) that arrives in chunks of any size."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._rest = ""
        self._kind = ""
        self._data: list[str] = []
        self.complete = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yields the events that are complete with this chunk. Raises ApiError at an `error` event."""
        *lines, self._rest = (self._rest + self._decode(chunk)).split("\n")
        for line in lines:
            yield from self._line(line.removesuffix("\r"))

    def end(self) -> None:
        """Raises ConnectionFailed if no act arrived. The act can then be sent again with the same arguments."""
        if not self.complete:
            raise ConnectionFailed("the stream ended before its `act` event; send the same act again")

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
    """Parses NDJSON, one document per line. Only a line feed ends a line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def end(self) -> None:
        if self._rest:
            raise ConnectionFailed("the stream ended in the middle of a line, so the export is incomplete")
