"""Owns what operators call: health, readiness, version, metrics."""

import asyncio
import contextlib
import dataclasses
import importlib.metadata

import orjson
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service.api.schemas import Ready, Version
from service.metrics import ACTIVE_EPISODES, TASKS
from service.store.base import StoreUnavailable

router = APIRouter(tags=["operations"])


@router.get("/healthz", response_model=Ready)
async def healthz() -> Response:
    """The process lives, the model loaded or not."""
    return _json({"status": "ok"})


@router.get("/readyz", response_model=Ready, responses={503: {"description": "Not ready; `reason` says why."}})
async def readyz(request: Request) -> Response:
    """200 when an act would be served."""
    sessions = request.app.state.sessions
    reason = sessions.unready_reason
    if reason is None:
        try:
            await sessions.store.episode("-")
        except StoreUnavailable:
            reason = "store_unavailable"
    if reason:
        return _json({"status": "unready", "reason": reason}, 503)
    return _json({"status": "ready"})


@router.get("/version", response_model=Version)
async def version(request: Request) -> Response:
    """The service's version, the policy's, and how its chat template behaves; null while it loads."""
    sessions = request.app.state.sessions
    if sessions.unready_reason == "loading":
        policy: dict[str, object] = {name: None for name in ("policy", "policy_version", "max_model_len", "template")}
    else:
        info = sessions.agent.engine.info
        policy = {
            "policy": info.model,
            "policy_version": info.version,
            "max_model_len": info.max_model_len,
            "template": dataclasses.asdict(sessions.agent.prompt.report),
        }
    return _json({"version": importlib.metadata.version("episodic"), **policy})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text: ours `agent_*`, the engine's `vllm:*`."""
    with contextlib.suppress(StoreUnavailable):  # other replicas open and end episodes too: the store alone knows
        ACTIVE_EPISODES.set(await request.app.state.sessions.store.num_active())
    TASKS.set(len(asyncio.all_tasks()))
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _json(document: object, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
