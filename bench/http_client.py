"""A minimal HTTP/1.1 client for load generation: one keep-alive connection, one request at a time, bytes counted.

It is as light as possible, because it shares the machine with the servers that it measures.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import orjson


class UnexpectedStatus(RuntimeError):
    """The server answered with a status other than 2xx. The message contains the start of the response body."""


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
        """Sends a JSON body and returns the response's JSON. Raises UnexpectedStatus, ConnectionError.

        `headers` are further header lines, each with CRLF at its end.
        """
        response = await self.request("POST", path, orjson.dumps(document), headers)
        if not 200 <= response.status < 300:
            raise UnexpectedStatus(f"{path}: {response.status} {response.body[:500].decode(errors='replace')}")
        return orjson.loads(response.body)

    async def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> Response:
        """Sends a request and returns the response. Raises ConnectionError."""
        assert self._transport, "the connection has not been opened"
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        message = head.encode() + b"\r\n" + body
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        self.bytes_sent += len(message)
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport only lacks the base class

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
    """Parses a response, with a Content-Length or chunked. Returns None while it is incomplete."""
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
