"""Owns how the app is served, and what a connection may cost before its request is there and after the answer.

uvicorn (0.54) bounds neither the size of a request's head nor the time that it takes, takes in requests that are sent
ahead without limit, reads the rest of a refused body for as long as it comes, and waits forever for a caller that does
not read its answer.
"""

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
MAX_PIPELINED = 16
_LINGER_S = 2.0
"""How long the rest of a refused body is read, so that its sender finds the answer and not a reset connection."""

_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]
"""On every answer, those that no handler has seen included."""


def config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """How the app is served, in earnest and under test; `options` are uvicorn's."""
    bounds: dict[str, Any] = {
        "http": BoundedHttp,
        "ws": "none",
        "headers": _HEADERS,
        "server_header": False,
        "proxy_headers": False,
        "log_config": None,
        "access_log": False,
        "timeout_keep_alive": 75,  # an environment may take a while to step
    }
    return uvicorn.Config(app, **{**bounds, **options})


_INVALID = 400, "Invalid HTTP request."
_TOO_LARGE = 431, "The request's head is too large."
_NO_UPGRADE = 400, "Only HTTP/1.1 is spoken here: send the request without Upgrade."


class _Refused(Exception):
    """Leaves the parser."""


class BoundedHttp(HttpToolsProtocol):
    """A connection. A timer runs while its caller owes the rest of a request, or does not read.

    A request that arrives whole, as nearly all do, starts none.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        app: Any = self.config.app
        self._limit_s: float = app.state.services.settings.receive_limit_s
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._in_head = False
        self._in_message = False
        self._num_head_bytes = 0  # in the pieces before this one
        self._may_be_large = False
        self._refusal = _INVALID

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(self._limit_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
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
        self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.headers) > MAX_HEADERS or (self._may_be_large and self._head_size() > MAX_HEAD_BYTES):
            self._refusal = _TOO_LARGE
            raise _Refused
        assert self.parser is not None  # it calls this
        if self.parser.should_upgrade() and self._has_body():
            self._refusal = _NO_UPGRADE
            raise _Refused
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise _Refused

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_message = False
        if self._deadline is not None:
            self._expect(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message and not self._in_head and not self._is_busy:
            self._unset_keepalive_if_required()
            self._expect(_LINGER_S)

    def send_400_response(self, msg: str) -> None:
        """Says why in plain text, unless that would end up within another answer."""
        if not self._is_busy and not self.transport.is_closing():
            status, reason = self._refusal
            headers = [*self.server_state.default_headers, (b"content-type", b"text/plain; charset=utf-8")]
            headers += [(b"content-length", str(len(reason)).encode()), (b"connection", b"close")]
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + reason.encode())
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait for an answer that nobody reads to be read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _unsupported_upgrade_warning(self) -> None:
        """An offer to speak something else is passed over. What follows on the connection is not parsed any more."""
        self.cycle.keep_alive = False

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _watch(self) -> None:
        """Starts or stops the timer of a head that is to come, or to end."""
        if self._in_head or not (self._is_busy or self._in_message):
            if self._deadline is None:
                self._expect(self._limit_s)
        elif self._is_busy and self._deadline is not None:
            self._expect(None)  # the rest is the body's, whose reader limits it

    def _has_body(self) -> bool:
        return any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _expect(self, seconds: float | None) -> None:
        """The caller has so long to send what it owes; None: it owes nothing."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        self._deadline = None
        if self._is_busy:  # the head of a request that was sent ahead; it is not read on before its turn
            self._expect(self._limit_s)
        else:
            self.transport.abort()
