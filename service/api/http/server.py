"""Configures uvicorn, and limits what one connection can cost: slow, large, pipelined and unread requests.

uvicorn (0.54) lacks these limits:
- on the size of a request's head (request line and headers), and on the time that it takes to arrive;
- on the number of pipelined requests;
- on the time for which it reads the rest of a refused body;
- on the time for which it waits for a client that does not read the response.

If the server closes the connection after a response, `Connection: close` in that response announces it.
"""

import asyncio
import errno
import socket
from secrets import token_hex
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.api.http import middleware, problems
from service.errors import EpisodicError, HeadersTooLarge, MalformedRequest

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
MAX_PIPELINED = 16
_BACKLOG = 2048
_LINGER_S = 2.0
"""Seconds for which the rest of a refused body is read, so that its sender receives the response and not a reset."""

_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]
"""Sent with every response, also with those that uvicorn writes itself."""


def config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """Returns the uvicorn configuration, for production and for tests. `options` override the defaults."""
    defaults: dict[str, Any] = {
        "http": BoundedHttp,
        "ws": "none",
        "headers": _HEADERS,
        "server_header": False,
        "proxy_headers": False,
        "log_config": None,
        "access_log": False,
        "timeout_keep_alive": 75,  # seconds; a step of an environment may take long
    }
    return uvicorn.Config(app, **{**defaults, **options})


def listen(host: str, port: int) -> list[socket.socket]:
    """Listens on every address of the host, at one port. If it is 0, picks a free one. Raises OSError.

    Addresses that this machine does not have are left out, such as the one of localhost for IPv6, unless all are.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    refusal = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    for family, address in dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found):
        chosen = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(socket.create_server((address, chosen), family=family, backlog=_BACKLOG))
        except OSError as error:
            refusal = error
    if not sockets or refusal.errno != errno.EADDRNOTAVAIL:
        for opened in sockets:
            opened.close()
        raise refusal
    return sockets


_INVALID = MalformedRequest(
    "malformed_request",
    "The request is not valid HTTP/1.1. Check its request line, its headers and its Content-Length.",
)
_TOO_LARGE = HeadersTooLarge(
    "headers_too_large",
    f"The request line and headers are too large. Send at most {MAX_HEAD_BYTES} bytes, {MAX_HEADERS} headers.",
)
_NO_UPGRADE = MalformedRequest(
    "malformed_request", "Only HTTP/1.1 is supported. Send the request without the Upgrade header."
)


class _Refused(Exception):
    """Raised in a callback to stop the parser."""


class _Corked:
    """A transport that holds back the head of a response until its body follows: one system call sends both."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._head = data

    def close(self) -> None:
        self._transport.close()


class _Cycle(RequestResponseCycle):
    """A request and its response.

    is_last: whether the response started before the whole body arrived. The response then announces that the connection
    closes. It closes when the rest of the body has been read, or some time later. If it closed at once, the client
    could receive a reset instead of the response.
    """

    is_last = False

    async def send(self, message: Any) -> None:
        if message.get("is_whole") and self.scope["method"] != "HEAD":
            self.transport = _Corked(self.transport)  # type: ignore[assignment]
        if self.response_started or not self.more_body:
            await super().send(message)
            return
        self.is_last = True
        self.keep_alive = False
        await super().send(message)  # adds the header Connection
        self.keep_alive = True  # so that uvicorn does not close the connection at once


class BoundedHttp(HttpToolsProtocol):
    """An HTTP connection with limits. A timer runs while a request is incomplete or the client does not read.

    A request that arrives in one piece, as nearly all do, starts no timer.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        app: Any = self.config.app
        self._limit_s: float = app.state.services.settings.receive_limit_s
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._in_message = False
        self._num_head_bytes = 0  # received before the current piece
        self._may_be_large = False
        self._refusal: EpisodicError = _INVALID

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_read_timer(self._limit_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_read_timer(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._may_be_large = self._num_head_bytes + len(data) > MAX_HEAD_BYTES
        super().data_received(data)
        if self._in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refusal = _TOO_LARGE
                self.send_400_response("")
        self._update_read_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.transport.is_closing():
            raise _Refused
        if len(self.headers) > MAX_HEADERS or (self._may_be_large and self._head_size() > MAX_HEAD_BYTES):
            self._refusal = _TOO_LARGE
            raise _Refused
        assert self.parser is not None  # the parser calls this method
        if self.parser.should_upgrade() and self._has_body():
            self._refusal = _NO_UPGRADE
            raise _Refused
        super().on_headers_complete()
        self.cycle.__class__ = _Cycle  # uvicorn has no hook for the class
        if len(self.pipeline) > MAX_PIPELINED:
            raise _Refused

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_message = False
        self.scope["is_complete"] = True  # type: ignore[typeddict-unknown-key]  # see `body.read_bytes`
        if self._read_timer is not None:
            self._set_read_timer(None)
        self._close_if_last()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message and not self._in_head and not self._is_busy:
            self._unset_keepalive_if_required()
            self._set_read_timer(_LINGER_S)
        else:
            self._close_if_last()

    def send_400_response(self, msg: str) -> None:
        """Sends the refusal, unless another response is being sent. Closes the connection."""
        if not self._is_busy and not self.transport.is_closing():
            self.transport.write(self._refusal_bytes())
        self.transport.close()

    def _refusal_bytes(self) -> bytes:
        status = self._refusal.status
        request_id = middleware.request_id_of(self.headers if self._in_head else []) or token_hex(8)
        scope = {"type": "http", "request_id": request_id}
        response = problems.response(Request(scope), self._refusal)
        middleware.log_request(status, request_id=request_id)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        headers += [(b"x-request-id", request_id.encode()), (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        return STATUS_LINE[status] + lines + b"\r\n" + bytes(response.body)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # close() would wait until the client has read the response

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _unsupported_upgrade_warning(self) -> None:
        """Ignores the Upgrade header. The parser has stopped, so the connection closes after the response."""
        self.cycle.keep_alive = False

    def _close_if_last(self) -> None:
        """Closes the connection after an early response, once the rest of the body has arrived."""
        if self.cycle.response_complete and isinstance(self.cycle, _Cycle) and self.cycle.is_last:
            self.transport.close()

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _update_read_timer(self) -> None:
        """Starts the read timer while a request's head is missing or incomplete; otherwise stops it."""
        if self._in_head or not (self._is_busy or self._in_message):
            if self._read_timer is None:
                self._set_read_timer(self._limit_s)
        elif self._is_busy and self._read_timer is not None:
            self._set_read_timer(None)  # only the body is missing, and `body.read_bytes` has its own timeout

    def _has_body(self) -> bool:
        return any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _set_read_timer(self, seconds: float | None) -> None:
        """Restarts the read timer: the client has this many seconds to send the rest. None stops the timer."""
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = None if seconds is None else self.loop.call_later(seconds, self._on_read_timeout)

    def _on_read_timeout(self) -> None:
        self._read_timer = None
        if self._is_busy:  # the incomplete head is that of a pipelined request, which is not read before its turn
            self._set_read_timer(self._limit_s)
        else:
            self.transport.abort()
