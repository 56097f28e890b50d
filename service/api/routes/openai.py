"""Owns /v1 and its kin: hands the request to the engine's own OpenAI-compatible app, or says why it cannot."""

from contextlib import nullcontext

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from service.api.http import body
from service.api.http.caller import caller
from service.engine.base import CACHE_SALT, cache_salt
from service.errors import EpisodicError, TooManyRequests
from service.sessions.sessions import Sessions

_ROOTS = ("tokenize", "detokenize", "pooling", "classify", "score", "rerank")
_RETRY_AFTER_S = "5"


class _Inference:
    """An ASGI app. Failures of its own have OpenAI's error shape: that is what clients of /v1 read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        sessions: Sessions = request.app.state.sessions
        if reason := sessions.unready_reason:
            headers = {"Retry-After": _RETRY_AFTER_S}
            await _error(503, f"The service is not ready: {reason}.", reason, headers)(scope, receive, send)
            return
        app = await sessions.agent.engine.inference()
        if app is None:
            await _error(501, "The engine serves episodes only.", "not_implemented")(scope, receive, send)
            return
        try:
            content = await body.read_bytes(request)
            if content and "json" in request.headers.get("content-type", ""):
                body.check_json(content)  # vLLM reads it without our bounds
        except EpisodicError as error:
            await _error(error.status, error.detail, error.code)(scope, receive, send)
            return
        tenant = caller(request).tenant
        CACHE_SALT.set(cache_salt(tenant))
        try:
            with sessions.admission.admitted(tenant):
                async with sessions.admission.turn(tenant) if scope["method"] == "POST" else nullcontext():
                    await app(scope, _again(content, receive), send)
        except TooManyRequests as error:
            await refusal(request, error)(scope, receive, send)


def _again(content: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes after it."""
    first: Message | None = {"type": "http.request", "body": content, "more_body": False}

    async def replayed() -> Message:
        nonlocal first
        message, first = first, None
        return message or await receive()

    return replayed


def owns(path: str) -> bool:
    """Whether the path is one of /v1's kin."""
    return path.startswith("/v1/") or path.removeprefix("/") in _ROOTS


def refusal(_: Request, error: EpisodicError) -> Response:
    """A failure of the service's in OpenAI's shape."""
    return _error(error.status, error.detail, error.code, dict(error.headers))


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    document = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(orjson.dumps(document), status, headers, media_type="application/json")


router = APIRouter()
router.routes.append(Route("/v1/{path:path}", _Inference(), include_in_schema=False))
router.routes.extend(Route(f"/{root}", _Inference(), include_in_schema=False) for root in _ROOTS)
