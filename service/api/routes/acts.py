"""POST /act, answered as JSON or as a stream of events, and POST /act/batch."""

import asyncio
import time
from collections import Counter
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.http import body, problems, schemas
from service.api.http.acting import WhileConnected, admitted
from service.api.http.answers import json_answer
from service.api.http.caller import caller, own
from service.api.http.media_types import accepts
from service.api.http.openapi import IDEMPOTENCY_KEY, request_body
from service.api.http.routing import StrictRoute
from service.api.http.services import services
from service.api.routes.act_streams import EVENTS, ActStream
from service.errors import Unprocessable
from service.sessions.acts import ActRequest, Deadline
from service.sessions.sessions import Answer

router = APIRouter(tags=["acts"], route_class=StrictRoute)


@router.post(
    "/act",
    summary="Act",
    response_model=schemas.Act,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string", "description": EVENTS}}}}}
    | problems.documented(400, 404, 409, 410, 413, 422, 500, 503, 504),
    openapi_extra={"requestBody": request_body(schemas.ActRequest), "parameters": [IDEMPOTENCY_KEY]},
)
async def act(request: Request) -> Response:
    """Sends an observation and returns the policy's action. The step is stored durably before the answer is sent.

    To make retries safe, send `step` or the header Idempotency-Key: a retry then returns the stored step. With
    `Accept: text/event-stream` the answer is streamed.
    """
    parsed, digest = await body.read(request, schemas.ActRequest)
    act_request = ActRequest(parsed.message(), digest, parsed.step, body.idempotency_key(request), parsed.timeout_s)
    episode_id = own(request, parsed.episode_id)
    if accepts(request, "text/event-stream"):
        return ActStream(request, episode_id, act_request)
    async with WhileConnected(request):
        with admitted(request):
            return json_answer(await services(request).sessions.act(episode_id, act_request))


@router.post(
    "/act/batch",
    summary="Act in many episodes",
    response_model=schemas.BatchAnswer,
    responses=problems.documented(400, 413, 422),
    openapi_extra={"requestBody": request_body(schemas.BatchRequest)},
)
async def batch(request: Request) -> Response:
    """Acts in many episodes with one call, for vectorized environments. The acts run concurrently, as far as the quota
    of concurrent acts allows; the others follow in turn.

    The answer has one result for each act, in the same order. If an act fails, its result is a problem document; the
    other acts are not affected.
    """
    acts = body.validated(await body.read_document(request, unchecked="acts"), schemas.BatchRequest).acts
    counts = Counter(name for item in acts if isinstance(name := item.get("episode_id"), str))
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise Unprocessable(f"acts: episode {repeated[0]!r} appears more than once. Send one act per episode.", "acts")
    behind, tenant = services(request), caller(request).tenant
    behind.sessions.refuse_acts_while_draining()
    behind.admission.check(tenant)
    behind.admission.count_rest(tenant, len(acts) - 1)
    arrived = time.perf_counter()
    async with WhileConnected(request):
        results = await asyncio.gather(*(_act_or_problem(request, item, arrived) for item in acts))
    return json_answer({"results": results})


async def _act_or_problem(request: Request, item: dict[str, Any], arrived: float) -> Answer:
    behind, tenant = services(request), caller(request).tenant
    try:
        body.check(item)
        parsed = body.validated(item, schemas.ActRequest)
        act_request = ActRequest(
            parsed.message(), body.digest(item), parsed.step, timeout_s=parsed.timeout_s, arrived=arrived
        )
        async with Deadline(act_request):
            await behind.admission.enter_in_turn(tenant)
        try:
            return await behind.sessions.act(own(request, parsed.episode_id), act_request)
        finally:
            behind.admission.leave(tenant)
    except Exception as error:  # noqa: BLE001 - an error of one act must not fail the batch
        return problems.document(request, problems.expected(error))
