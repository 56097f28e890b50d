"""Calls for operators and orchestrators: health, readiness, version, metrics."""

import asyncio
import dataclasses
import math
from contextlib import suppress

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service.api.http import problems
from service.api.http.answers import json_answer
from service.api.http.openapi import VERSION
from service.api.http.routing import StrictRoute
from service.api.http.schemas import Ready, Version
from service.api.http.services import Services, services
from service.engine.base import Engine, EngineUnavailable
from service.observability.metrics import ACTIVE_EPISODES, TASKS, set_state
from service.store.base import StoreUnavailable

router = APIRouter(tags=["operations"], route_class=StrictRoute)

_STORE_LIMIT_S = 2.0
"""Timeout of the store for /readyz and /metrics. Without it, a hanging store would block both and stay unreported."""


@router.get("/healthz", summary="Liveness", response_model=Ready, responses=problems.documented(public=True))
async def healthz() -> Response:
    """Returns 200 while the process runs, whether the model is loaded or not. Use it as a liveness probe."""
    return json_answer({"status": "ok"})


@router.get(
    "/readyz",
    summary="Readiness",
    response_model=Ready,
    responses={503: {"description": "`reason`: loading, engine_unavailable, store_unavailable, or draining."}}
    | problems.documented(public=True),
)
async def readyz(request: Request) -> Response:
    """Returns 200 if the service can serve acts, 503 with a `reason` if not. Use it as a readiness probe."""
    reason = await _unready_reason(services(request))
    if reason:
        return json_answer({"status": "unready", "reason": reason}, 503)
    return json_answer({"status": "ready"})


@router.get("/version", summary="Version", response_model=Version, responses=problems.documented())
async def version(request: Request) -> Response:
    """Returns the versions of the service and of the policy, and how the policy's chat template behaves.

    While the model loads, all fields but `version` are null. `template` is null if the model serves no episodes, or is
    an encoder-decoder, which has no chat template.
    """
    engine = _engine(request)
    if engine is None:
        policy: dict[str, object] = {name: None for name in ("policy", "policy_version", "max_model_len", "template")}
    else:
        info = engine.info
        policy = {
            "policy": info.model,
            "policy_version": info.version,
            "max_model_len": info.max_model_len,
            "template": engine.template and dataclasses.asdict(engine.template),
        }
    return json_answer({"version": VERSION, **policy})


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse, responses=problems.documented())
async def metrics(request: Request) -> Response:
    """Returns metrics in Prometheus text format: `agent_*` of the service, `vllm:*` of the engine."""
    behind = services(request)
    reason = await _unready_reason(behind)
    num_active = math.nan
    if reason != "store_unavailable":
        with suppress(StoreUnavailable, TimeoutError):  # only the store knows the episodes of all replicas
            async with asyncio.timeout(_STORE_LIMIT_S):
                num_active = await behind.sessions.store.num_active()
    ACTIVE_EPISODES.set(num_active)
    engine = _engine(request)
    info = None if engine is None else engine.info
    set_state(reason, VERSION, info and info.model, info and info.version)
    TASKS.set(len(asyncio.all_tasks()))
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _unready_reason(behind: Services) -> str | None:
    """Returns why a load balancer should choose another replica; None if this one is ready."""
    if reason := behind.lifecycle.routing_reason:
        return reason
    try:
        async with asyncio.timeout(_STORE_LIMIT_S):
            await behind.sessions.store.episode("-")
    except (StoreUnavailable, TimeoutError):
        return "store_unavailable"
    return None


def _engine(request: Request) -> Engine | None:
    """Returns the engine; None while the first one is loading."""
    try:
        return services(request).sessions.agent.engine
    except EngineUnavailable:
        return None
