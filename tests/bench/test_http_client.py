"""The load generator's HTTP client: parsing of responses byte by byte, and requests to a real server."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bench.http_client import Connection, Response, UnexpectedStatus, parse

_LENGTH = b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nhello"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


@pytest.mark.parametrize(("message", "expected"), [(_LENGTH, (201, b"hello")), (_CHUNKED, (200, b"hello world"))])
def test_an_answer_is_read_whole_and_not_before(message: bytes, expected: tuple[int, bytes]) -> None:
    assert parse(message) == Response(*expected)
    for cut in range(len(message)):
        assert parse(message[:cut]) is None


@asynccontextmanager
async def _server(answer: bytes, *, pieces: int = 1) -> AsyncGenerator[tuple[int, list[bytes]]]:
    """A server that answers every request the same way, in `pieces`. Yields its port and the requests it received."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((line for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), b":0")
                requests.append(head + await reader.readexactly(int(length.split(b":")[1])))
                if not answer:
                    break
                for start in range(0, len(answer), -(-len(answer) // pieces)):
                    writer.write(answer[start : start + -(-len(answer) // pieces)])
                    await writer.drain()
                    await asyncio.sleep(0.01)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], requests


async def _post(port: int, times: int = 1) -> tuple[Any, int]:
    connection = await Connection("127.0.0.1", port).open()
    try:
        for _ in range(times):
            answer = await connection.post("/act", {"step": 1}, "X-Episode-Id: e\r\n")
        return answer, connection.bytes_sent
    finally:
        connection.close()


async def test_requests_share_a_connection_and_every_byte_sent_is_counted() -> None:
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"text":"a"}'
    async with _server(answer, pieces=4) as (port, requests):
        received, num_bytes = await _post(port, times=3)
    assert received == {"text": "a"}
    assert len(requests) == 3
    assert sum(map(len, requests)) == num_bytes
    assert requests[0].startswith(b"POST /act HTTP/1.1\r\n")
    assert b"X-Episode-Id: e\r\n" in requests[0]
    assert requests[0].endswith(b'{"step":1}')


async def test_an_error_answer_and_a_closed_connection_are_told_apart() -> None:
    async with _server(b"HTTP/1.1 409 Conflict\r\nContent-Length: 4\r\n\r\nbusy") as (port, _):
        with pytest.raises(UnexpectedStatus, match="/act: 409 busy"):
            await _post(port)
    async with _server(b"") as (port, _):
        with pytest.raises(ConnectionError):
            await _post(port)
