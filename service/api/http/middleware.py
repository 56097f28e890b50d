"""Middleware for every request: sets the request id, writes a log line, counts the request, answers failures."""

import logging
import re
import time
from collections.abc import Iterable
from itertools import count
from secrets import token_hex

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.http import problems
from service.api.http.services import Services
from service.observability import logs, metrics

_log = logs.get(__name__)
_stdlib_log = logging.getLogger(__name__)

_PROBES = ("/healthz", "/readyz", "/metrics")
Headers = Iterable[tuple[bytes, bytes]]
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestContext:
    """Gives each request its id and the services, and logs and counts the request when it was answered.

    The id is the caller's X-Request-ID, or a new one. It and X-Episode-Id are in all log lines of the request. Acts
    that are served or refused with 429 are logged at debug level: at a thousand acts per second, writing the log line
    would cost more than serving the act.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        self._prefix = token_hex(6)  # one per process: a random id for each request would cost a system call
        self._numbers = count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        method, path = scope["method"], scope["path"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves out the body of the response
        headers = dict(scope["headers"])
        request_id = _printable(headers.get(b"x-request-id")) or f"{self._prefix}-{next(self._numbers)}"
        episode_id = _printable(headers.get(b"x-episode-id"))
        logs.set_request({"request_id": request_id} | ({"episode_id": episode_id} if episode_id else {}))
        scope["request_id"], scope["services"], scope["status"] = request_id, self._services, 0
        lifecycle = self._services.lifecycle
        if path not in _PROBES:
            lifecycle.num_calls += 1

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if lifecycle.is_leaving:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            log_request(
                scope["status"] or 499,
                "-" if route is None else getattr(route, "path", "-"),
                method=method,
                path=path,
                seconds=round(time.perf_counter() - began, 6),
            )


class Failures:
    """Answers a request that fails, so that its connection can be used again.

    If the response has already started, the exception goes on to uvicorn, which breaks off the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http" or scope["status"]:
                raise
            await problems.refusal(Request(scope), error)(scope, receive, send)


def log_request(status: int, route: str = "-", *, method: str = "-", path: str = "-", **fields: object) -> None:
    """Logs a request that was answered, and counts it. `route` is the path with placeholders."""
    metrics.count_request(route, status)
    if not _is_quiet(path, status):
        _log.info("request", method=method, path=path, status=status, **fields)
    elif _stdlib_log.isEnabledFor(logging.DEBUG):
        _log.debug("request", method=method, path=path, status=status, **fields)


def request_id_of(headers: Headers) -> str | None:
    """Returns the caller's X-Request-ID; None if it is missing or not printable."""
    return _printable(dict(headers).get(b"x-request-id"))


def _is_quiet(path: str, status: int) -> bool:
    return path in _PROBES or (path == "/act" and (status < 400 or status == 429))


def _printable(value: bytes | None) -> str | None:
    return value.decode() if value is not None and _REQUEST_ID.fullmatch(value) else None
