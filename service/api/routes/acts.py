"""Owns POST /act, as one answer or as a stream of events, and POST /act/batch."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.http import body, problems
from service.api.http.caller import caller, own
from service.api.http.openapi import request_body
from service.api.http.schemas import Act, ActRequest, BatchAnswer, BatchRequest
from service.errors import Unprocessable
from service.sessions.episode import Call, Listener
from service.sessions.sessions import Answer, Sessions

router = APIRouter(tags=["acts"])

T = TypeVar("T")

KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "Makes a retry safe, as `step` does.",
}
_EVENTS = "Server-sent events `reasoning` and `text` ({delta}), then one `act`, or `error` (a problem)."
_UNBUFFERED = {"X-Accel-Buffering": "no"}
"""nginx's own: it passes each event on as it comes."""
CLIENT_CLOSED = 499
"""Nobody hears it; the log does."""


@router.post(
    "/act",
    response_model=Act,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": _EVENTS}}}}}
    | problems.documented(400, 404, 409, 410, 413, 422, 503, 504),
    openapi_extra={"requestBody": request_body(ActRequest), "parameters": [KEY]},
)
async def act(request: Request) -> Response:
    """Takes an observation to the policy's action. The step is durable before the answer leaves."""
    asked, digest = await body.read(request, ActRequest)
    call = Call(asked.message(), digest, asked.step, idempotency_key(request), asked.timeout_s)
    sessions: Sessions = request.app.state.sessions
    if "text/event-stream" in request.headers.get("accept", ""):
        return await _stream(request, sessions, own(request, asked.episode_id), call)
    return await answered(request, admitted(request, lambda: sessions.act(own(request, asked.episode_id), call)))


@router.post(
    "/act/batch",
    response_model=BatchAnswer,
    responses=problems.documented(400, 413, 422),
    openapi_extra={"requestBody": request_body(BatchRequest)},
)
async def batch(request: Request) -> Response:
    """Acts in many episodes at once, as for vectorised environments; one bad act spoils no other."""
    document = await body.read_document(request)
    acts = body.validated(document, BatchRequest).acts
    names = [item.get("episode_id") for item in acts]
    if twice := sorted({name for name in names if isinstance(name, str) and names.count(name) > 1}):
        raise Unprocessable(f"episode {twice[0]!r} is there twice", "acts")
    if len(acts) > 1:
        request.app.state.sessions.admission.count_calls(caller(request).tenant, len(acts) - 1)
    return await answered(request, admitted(request, lambda: _all(request, acts), len(acts)))


async def admitted(request: Request, acting: Callable[[], Awaitable[T]], num_acts: int = 1) -> T:
    """What `acting` gives, if there is a place for so many acts of the caller's. Raises TooManyRequests."""
    sessions: Sessions = request.app.state.sessions
    with sessions.admission.admitted(caller(request).tenant, num_acts):
        return await acting()


async def answered(request: Request, answer: Awaitable[Any]) -> Response:
    """The awaited answer as JSON; given up when the caller goes away."""
    try:
        async with _while_connected(request):
            document = await answer
    except _Gone:
        return Response(status_code=CLIENT_CLOSED)
    return Response(orjson.dumps(document, default=str), media_type="application/json")


async def _all(request: Request, acts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"results": await asyncio.gather(*(_one(request, item) for item in acts))}


async def _one(request: Request, item: dict[str, Any]) -> Answer:
    try:
        asked = body.validated(item, ActRequest)
        call = Call(asked.message(), body.digest(item), asked.step, timeout_s=asked.timeout_s)
        return await request.app.state.sessions.act(own(request, asked.episode_id), call)
    except Exception as error:  # noqa: BLE001 - each act has an answer of its own
        return problems.document(request, problems.expected(error))


async def _stream(request: Request, sessions: Sessions, episode_id: str, call: Call) -> Response:
    """Events from the first one on; a failure before it is an answer like any other's."""
    heard: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()

    def emit(kind: str, delta: str) -> None:
        heard.put_nowait((kind, delta))

    call = replace(call, emit=Listener(emit))
    acting = asyncio.create_task(admitted(request, lambda: sessions.act(episode_id, call)))
    acting.add_done_callback(lambda _: heard.put_nowait(None))
    try:
        async with _while_connected(request):
            first = await heard.get()
    except _Gone:
        await _cancelled(acting)
        return Response(status_code=CLIENT_CLOSED)
    except asyncio.CancelledError:
        await _cancelled(acting)
        raise
    if first is None:
        acting.result()  # raises what the act failed for
    return StreamingResponse(
        _events(request, first, heard, acting), media_type="text/event-stream", headers=_UNBUFFERED
    )


async def _events(
    request: Request,
    item: tuple[str, str] | None,
    heard: "asyncio.Queue[tuple[str, str] | None]",
    acting: "asyncio.Task[Answer]",
) -> AsyncGenerator[bytes]:
    """Whoever reads this no longer, has the act cancelled."""
    kinds: set[str] = set()
    try:
        while item is not None:
            kinds.add(item[0])
            yield _event(item[0], {"delta": item[1]})
            item = await heard.get()
        answer = acting.result()
        for kind in ("reasoning", "text"):  # a stored or joined act, or an action that was not written token by token
            if answer[kind] and kind not in kinds:
                yield _event(kind, {"delta": answer[kind]})
        yield _event("act", answer)
    except Exception as error:  # noqa: BLE001 - the status line is long sent
        yield _event("error", problems.document(request, problems.expected(error)))
    finally:
        await _cancelled(acting)


def _event(kind: str, data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data, default=str))


async def _cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        raise Unprocessable("Idempotency-Key must have 1 to 255 characters", "Idempotency-Key")
    return key


class _Gone(Exception):
    """The caller went away."""


@asynccontextmanager
async def _while_connected(request: Request) -> AsyncGenerator[None]:
    """Cancels what runs inside when the caller goes away, and raises _Gone: the body is read, so the next message is
    http.disconnect."""
    inside = asyncio.current_task()
    assert inside is not None
    is_inside = True

    def leave(task: "asyncio.Future[Any]") -> None:
        if is_inside and not task.cancelled():
            inside.cancel()

    watching = asyncio.ensure_future(request.receive())
    watching.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError as error:
        if not watching.done():
            raise
        inside.uncancel()
        raise _Gone from error
    finally:
        is_inside = False  # the answer may come as the caller leaves
        watching.cancel()
