"""Middleware for every request: sets the request id, writes a log line, counts the request, answers failures."""

import re
import time
from collections.abc import Iterable
from itertools import count
from secrets import token_hex

import structlog
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.http import problems
from service.observability import logs, metrics

_log = logs.get(__name__)

_PROBES = ("/healthz", "/readyz", "/metrics")
Headers = Iterable[tuple[bytes, bytes]]
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestContext:
    """Returns the caller's X-Request-ID or generates one, adds it and X-Episode-Id to all log lines, logs the request.

    Acts that are served or refused with 429 are logged at debug level: at a thousand acts per second, writing the log
    line would cost more than serving the act.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._prefix = token_hex(6)  # one per process: a random id for each request would cost a system call
        self._numbers = count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves out the body of the response
        request_id = request_id_of(scope["headers"]) or f"{self._prefix}-{next(self._numbers)}".encode()
        episode_id = _printable(scope["headers"], b"x-episode-id")
        scope["request_id"] = request_id.decode()
        context = {"request_id": scope["request_id"]}
        if episode_id:
            context["episode_id"] = episode_id.decode()
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**context)
        status = 0
        lifecycle = scope["app"].state.services.lifecycle
        if scope["path"] not in _PROBES:
            lifecycle.num_calls += 1

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                if lifecycle.is_leaving:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = round(time.perf_counter() - began, 6)
            route = getattr(scope.get("route"), "path", "-")
            log_request(status or 499, route, method=method, path=scope["path"], seconds=seconds)


class Failures:
    """Answers a request that fails unexpectedly, so that its connection can be used again.

    If the response has already started, the exception goes on to uvicorn, which breaks off the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_answered = False

        async def watched(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if is_answered or scope["type"] != "http":
                raise
            await problems.refusal(Request(scope), error)(scope, receive, send)


def log_request(status: int, route: str = "-", *, method: str = "-", path: str = "-", **fields: object) -> None:
    """Logs a request that was answered, and counts it. `route` is the path with placeholders."""
    metrics.count_request(route, status)
    (_log.debug if _is_quiet(path, status) else _log.info)("request", method=method, path=path, status=status, **fields)


def request_id_of(headers: Headers) -> bytes | None:
    """Returns the caller's X-Request-ID; None if it is missing or not printable."""
    return _printable(headers, b"x-request-id")


def _is_quiet(path: str, status: int) -> bool:
    return path in _PROBES or (path == "/act" and (status < 400 or status == 429))


def _printable(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name and _REQUEST_ID.fullmatch(value)), None)
