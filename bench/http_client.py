"""Owns the load generator's HTTP/1.1: one keep-alive connection, one request at a time, and a count of bytes sent.

It does as little as it can, so that client and servers, which share the machine, leave the servers most of it.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import orjson


class UnexpectedStatus(RuntimeError):
    """The server answered with another status than 2xx; the message holds its words."""


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """A connection to one server. `bytes_sent` counts all requests so far, headers included."""

    def __init__(self, host: str, port: int) -> None:
        self.bytes_sent = 0
        self._host, self._port = host, port
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[Response] | None = None

    async def open(self) -> "Connection":
        await asyncio.get_running_loop().create_connection(lambda: self, self._host, self._port)
        return self

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    async def post(self, path: str, document: Any, headers: str = "") -> Any:
        """The answer's JSON. `headers` are lines, each closed by CRLF. Raises UnexpectedStatus, ConnectionError."""
        response = await self.request("POST", path, orjson.dumps(document), headers)
        if not 200 <= response.status < 300:
            raise UnexpectedStatus(f"{path}: {response.status} {response.body[:500].decode(errors='replace')}")
        return orjson.loads(response.body)

    async def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> Response:
        assert self._transport, "open() comes first"
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        message = head.encode() + b"\r\n" + body
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        self.bytes_sent += len(message)
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        response = parse(self._buffer)
        if response and self._answer and not self._answer.done():
            self._buffer.clear()
            self._answer.set_result(response)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("the server closed the connection"))


def parse(message: bytes | bytearray) -> Response | None:
    """The response in `message`, None while it is not whole. A body is as long as its header says, or chunked."""
    end = message.find(b"\r\n\r\n")
    if end < 0:
        return None
    status = int(message[9:12])
    headers = dict(line.split(b":", 1) for line in bytes(message[:end]).lower().split(b"\r\n")[1:])
    if headers.get(b"transfer-encoding", b"").strip() == b"chunked":
        body = _chunks(message, end + 4)
    else:
        last = end + 4 + int(headers.get(b"content-length", 0))
        body = bytes(message[end + 4 : last]) if len(message) >= last else None
    return None if body is None else Response(status, body)


def _chunks(message: bytes | bytearray, start: int) -> bytes | None:
    body = b""
    while (line := message.find(b"\r\n", start)) >= 0:
        size = int(message[start:line].split(b";")[0], 16)
        start = line + 2 + size + 2
        if len(message) < start:
            return None
        if size == 0:
            return body
        body += message[line + 2 : start - 2]
    return None
