"""Middleware for every request: sets the request id, writes a log line, counts the request."""

import re
import time
from itertools import count
from secrets import token_hex

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability import logs, metrics

_log = logs.get(__name__)

_PROBES = ("/healthz", "/readyz", "/metrics")
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
        sent, episode_id = _ids(scope)
        request_id = sent or f"{self._prefix}-{next(self._numbers)}".encode()
        scope["request_id"] = request_id.decode()
        context = {"request_id": scope["request_id"]}
        if episode_id:
            context["episode_id"] = episode_id.decode()
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**context)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = 500  # Starlette's outer error middleware renders the response
            raise
        finally:
            status = status or 499
            metrics.count_request(getattr(scope.get("route"), "path", "-"), status)
            (_log.debug if _is_quiet(scope["path"], status) else _log.info)(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(time.perf_counter() - began, 6),
            )


def _is_quiet(path: str, status: int) -> bool:
    return path in _PROBES or (path == "/act" and (status < 400 or status == 429))


def _ids(scope: Scope) -> tuple[bytes | None, bytes | None]:
    """Returns X-Request-ID and X-Episode-Id; None for a header that is missing or not printable."""
    found = {b"x-request-id": None, b"x-episode-id": None}
    for name, value in scope["headers"]:
        if name in found and _REQUEST_ID.fullmatch(value):
            found[name] = value
    return found[b"x-request-id"], found[b"x-episode-id"]
