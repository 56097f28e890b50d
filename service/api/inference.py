"""Owns /v1 and its kin: hands the request to the engine's own OpenAI-compatible app, or says why it cannot."""

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from service.sessions import Sessions

_ROOTS = ("tokenize", "detokenize", "pooling", "classify", "score", "rerank")
_RETRY_AFTER_S = "1"


class _TooLarge(Exception):
    pass


class _Inference:
    """An ASGI app. Failures of its own have OpenAI's error shape: that is what clients of /v1 read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        sessions: Sessions = request.app.state.sessions
        if reason := sessions.unready_reason:
            headers = {"Retry-After": _RETRY_AFTER_S}
            await _error(503, f"The service is not ready: {reason}.", reason, headers)(scope, receive, send)
            return
        app = await sessions.agent.engine.inference()
        if app is None:
            await _error(501, "The engine serves episodes only.", "not_implemented")(scope, receive, send)
            return
        limit: int = request.app.state.settings.max_body_bytes
        too_large = _error(413, f"A body may have at most {limit} bytes.", "payload_too_large")
        if int(request.headers.get("content-length", 0)) > limit:
            await too_large(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, _limited(receive, limit), watched)
        except _TooLarge:
            if started:
                raise
            await too_large(scope, receive, send)


def _limited(receive: Receive, limit: int) -> Receive:
    left = limit

    async def limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _TooLarge
        return message

    return limited


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    document = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(orjson.dumps(document), status, headers, media_type="application/json")


router = APIRouter()
router.routes.append(Route("/v1/{path:path}", _Inference(), include_in_schema=False))
router.routes.extend(Route(f"/{root}", _Inference(), include_in_schema=False) for root in _ROOTS)
