"""Owns POST /act."""

import asyncio

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api import body, problems
from service.api.openapi import request_body
from service.api.schemas import Act, ActRequest
from service.episode import Call
from service.errors import Unprocessable

router = APIRouter(tags=["acts"])

_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "maxLength": 255},
    "description": "Makes a retry safe, as `step` does.",
}


@router.post(
    "/act",
    response_model=Act,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503, 504),
    openapi_extra={"requestBody": request_body(ActRequest), "parameters": [_KEY]},
)
async def act(request: Request) -> Response:
    """Takes an observation to the policy's action. The step is durable before the answer leaves."""
    asked, digest = await body.read(request, ActRequest)
    call = Call(asked.message(), digest, asked.step, _idempotency_key(request), asked.timeout_s)
    handler, gone = asyncio.current_task(), asyncio.create_task(_gone(request))
    assert handler is not None
    gone.add_done_callback(lambda task: task.cancelled() or handler.cancel())
    try:
        answer = await request.app.state.sessions.act(asked.episode_id, call)
    except asyncio.CancelledError:
        if not gone.done():
            raise
        return Response(status_code=499)  # nobody hears it; the log does
    finally:
        gone.cancel()
    return Response(orjson.dumps(answer), media_type="application/json")


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        raise Unprocessable("Idempotency-Key must have 1 to 255 characters", "Idempotency-Key")
    return key


async def _gone(request: Request) -> None:
    """Returns when the caller went away: the body is read, so what comes now is http.disconnect."""
    await request.receive()
