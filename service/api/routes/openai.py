"""/v1 and related paths: forwards requests to the engine's own OpenAI-compatible app, within the service's limits."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from service.access.admission import Admission
from service.api.http import body
from service.api.http.caller import caller
from service.api.http.media_types import content_type
from service.api.http.openai_errors import ROOTS, openai_error, refusal
from service.api.http.services import services
from service.engine.base import CACHE_SALT, SLOT, EngineUnavailable, Slot, cache_salt, uncancelled
from service.errors import EpisodicError, TooManyRequests, Unprocessable

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
"""Bodies that are not JSON. vLLM parses any other body as JSON, or refuses it."""
_MAX_REQUESTS = 1024
_INPUTS = ("prompt", "input", "documents", "text_1", "text_2", "queries", "data_1", "data_2")
"""Fields that can be a list with an input for each request to the model. A list of integers is one input, in tokens."""


class _OpenAI:
    """An ASGI app that checks a request and forwards it to the engine's app."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        behind = services(request)
        if reason := behind.lifecycle.unready_reason:
            headers = {"Retry-After": str(EngineUnavailable.retry_after_s)}
            detail = f"The service is not ready ({reason}). Retry after the number of seconds in Retry-After."
            await openai_error(503, detail, reason, headers)(scope, receive, send)
            return
        app = await behind.sessions.agent.engine.openai_app()
        if app is None:
            detail = "This engine has no OpenAI-compatible API. Use POST /episode and POST /act."
            await openai_error(501, detail, "not_implemented")(scope, receive, send)
            return
        try:
            content = await body.read_bytes(request)
            if content and content_type(request) not in _FORMS:
                _check_size(body.checked_json(content))  # vLLM parses JSON without these limits
        except EpisodicError as error:
            await openai_error(error.status, error.detail, error.code)(scope, receive, send)
            return
        tenant = caller(request).tenant
        CACHE_SALT.set(cache_salt(tenant))
        SLOT.set(_slots(behind.admission, tenant))
        try:
            with behind.admission.admitted(tenant), uncancelled():
                await app(scope, _with_body(content, receive), send)
        except TooManyRequests as error:
            await refusal(request, error)(scope, receive, send)


def _check_size(document: Any) -> None:
    """Raises Unprocessable if the call needs too many requests to the model, which would all wait at the same time."""
    given = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    num_inputs = max(_num_inputs(given.get(name)) for name in _INPUTS)
    num_choices = max(value if isinstance(value := given.get(name), int) else 1 for name in ("n", "best_of"))
    if num_inputs * num_choices > _MAX_REQUESTS:
        detail = (
            f"The call needs {num_inputs * num_choices} requests to the model; at most {_MAX_REQUESTS} are allowed."
        )
        raise Unprocessable(f"{detail} Send fewer inputs or choices at once.")


def _num_inputs(value: Any) -> int:
    if not isinstance(value, list):
        return 1
    inputs = cast("list[Any]", value)
    return 1 if all(isinstance(one, int) for one in inputs) else len(inputs)


def _slots(admission: Admission, tenant: str) -> Slot:
    """Returns what each request of one call to the model waits for. Each after the first counts as a further call."""
    num_requests = 0

    @asynccontextmanager
    async def slot() -> AsyncGenerator[None]:
        nonlocal num_requests
        num_requests += 1
        if num_requests > 1:
            admission.count_rest(tenant, 1)
        async with admission.slot(tenant):
            yield

    return slot


def _with_body(content: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that first gives the body that was already read, and then the messages after it."""
    first: Message | None = {"type": "http.request", "body": content, "more_body": False}

    async def replayed() -> Message:
        nonlocal first
        message, first = first, None
        return message or await receive()

    return replayed


router = APIRouter()
router.routes.append(Route("/v1/{path:path}", _OpenAI(), include_in_schema=False))
router.routes.extend(Route(f"/{root}", _OpenAI(), include_in_schema=False) for root in ROOTS)
