"""Translates every exception into an HTTP response: an RFC 9457 problem document with a stable code."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from service.api.http import openai_errors
from service.api.http.acting import ClientClosed
from service.api.http.schemas import Problem
from service.engine.base import EngineUnavailable
from service.errors import EpisodicError, PolicyFailed, Unavailable, Unprocessable
from service.observability import logs, metrics
from service.store.base import StoreUnavailable
from service.validation import strict_json

_log = logs.get(__name__)

CLIENT_CLOSED = 499
"""The caller disconnected. Nobody receives this status; it appears in the log and in metrics."""
_RETRY_AFTER_S = 1

CODES: dict[int, tuple[str, ...]] = {
    400: ("malformed_json", "malformed_request"),
    401: ("unauthenticated",),
    403: ("forbidden",),
    404: ("episode_not_found", "policy_not_found", "not_found"),
    405: ("method_not_allowed",),
    409: (
        "step_conflict",
        "idempotency_mismatch",
        "episode_busy",
        "episode_ended",
        "context_overflow",
        "policy_in_use",
        "no_previous_version",
    ),
    410: ("episode_deleted",),
    413: ("payload_too_large",),
    422: ("invalid_request",),
    429: ("rate_limited", "quota_exceeded", "overloaded"),
    431: ("headers_too_large",),
    500: ("internal_error", "policy_failed"),
    502: ("bad_gateway",),
    503: ("engine_unavailable", "store_unavailable", "draining"),
    504: ("deadline_exceeded", "gateway_timeout"),
}
"""The codes of each status. `deploy/proxy` answers `bad_gateway` and `gateway_timeout` itself."""


def documented(*statuses: int, public: bool = False) -> dict[int | str, dict[str, Any]]:
    """Returns OpenAPI's `responses` for these statuses and for those that every call may return.

    public: whether the call needs no API key.
    """
    statuses = (*statuses, 422, 500, *(() if public else (401, 403, 429)))
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"model": Problem, "description": ", ".join(CODES[status]), "content": content} for status in statuses
    }


def install(app: Starlette) -> None:
    """Registers the exception handlers of the app."""
    for kind in (EpisodicError, EngineUnavailable, StoreUnavailable, ClientClosed):
        app.add_exception_handler(kind, _expected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


def expected(error: Exception) -> EpisodicError:
    """Translates an exception into the error that the caller receives. Logs it if the cause is on the server."""
    match error:
        case PolicyFailed():
            _log.error("policy_failed")
            return error
        case EpisodicError():
            return error
        case EngineUnavailable():
            _log.warning("engine_unavailable", reason=str(error))
            return Unavailable("engine_unavailable", str(error), retry_after_s=error.retry_after_s)
        case StoreUnavailable():
            _log.error("store_unavailable", reason=str(error))
            # The store's own message may contain file names and host names.
            detail = "The store is unavailable. Retry after the number of seconds in Retry-After."
            return Unavailable("store_unavailable", detail, retry_after_s=_RETRY_AFTER_S)
        case _:
            _log.error("unexpected_failure", exc_info=error)
            metrics.UNEXPECTED_FAILURES.inc()
            return EpisodicError("internal_error", "Internal error. Search the server log for this request_id.")


def document(request: Request, error: EpisodicError) -> dict[str, Any]:
    """Returns the problem document of an error."""
    return {
        "type": f"/problems/{error.code}",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": request.scope.get("request_id", ""),
        **error.context,
    }


def response(request: Request, error: EpisodicError) -> Response:
    """Returns the error as an `application/problem+json` response."""
    body = strict_json.write(document(request, error), default=str)
    return Response(body, error.status, error.headers, media_type="application/problem+json")


def refusal(request: Request, error: Exception) -> Response:
    """Returns the response to any exception, in the format of the path that was called."""
    if isinstance(error, ClientClosed):
        return Response(status_code=CLIENT_CLOSED)
    answer = openai_errors.refusal if openai_errors.owns(request.scope["path"]) else response
    return answer(request, expected(error))


async def _expected(request: Request, error: Exception) -> Response:
    return refusal(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    """Handles an invalid path or query parameter. Bodies are validated in `body.read`."""
    assert isinstance(error, RequestValidationError)
    errors: list[dict[str, Any]] = [{"loc": list(item["loc"]), "msg": item["msg"]} for item in error.errors()]
    loc = errors[0]["loc"]
    detail = f"{loc[0]} parameter {loc[-1]!r}: {errors[0]['msg']}"
    return response(request, Unprocessable(detail, errors=errors))


class _Http(EpisodicError):
    """An unknown path or method."""


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    details = {
        404: "This path does not exist. Check it for typos; /docs lists all paths, unless it is turned off.",
        405: f"This path does not support {request.method}. The Allow header lists the methods that it supports.",
    }
    problem = _Http(code, details.get(error.status_code, str(error.detail)))
    problem.status, problem.title = error.status_code, str(error.detail)  # type: ignore[misc]
    answer = response(request, problem)
    answer.headers.update(error.headers or {})
    if error.status_code == 405:
        answer.headers["Allow"] = ", ".join(sorted(_allowed(request)))
    return answer


def _allowed(request: Request) -> set[str]:
    """Returns the methods of all routes with this path."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in route.methods or ()}
    return methods | ({"HEAD"} if "GET" in methods else set())
