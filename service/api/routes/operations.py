"""Owns what operators call: health, readiness, version, metrics."""

import asyncio
import dataclasses
import importlib.metadata
import math
from contextlib import suppress

import orjson
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service.agent.agent import Agent
from service.api.http.schemas import Ready, Version
from service.engine.base import EngineUnavailable
from service.observability.metrics import ACTIVE_EPISODES, TASKS, record_state
from service.sessions.sessions import Sessions
from service.store.base import StoreUnavailable

router = APIRouter(tags=["operations"])

_VERSION = importlib.metadata.version("episodic")
_STORE_LIMIT_S = 2.0
"""Of the store for /readyz and /metrics: what waits for a store that hangs says nothing of it."""


@router.get("/healthz", response_model=Ready)
async def healthz() -> Response:
    """The process lives, the model loaded or not."""
    return _json({"status": "ok"})


@router.get("/readyz", response_model=Ready, responses={503: {"description": "Not ready; `reason` says why."}})
async def readyz(request: Request) -> Response:
    """200 when an act would be served, now and in a moment."""
    sessions = request.app.state.sessions
    reason = await _unready_reason(sessions)
    if reason:
        return _json({"status": "unready", "reason": reason}, 503)
    return _json({"status": "ready"})


@router.get("/version", response_model=Version)
async def version(request: Request) -> Response:
    """The service's version, the policy's, and how its chat template behaves; null while it loads."""
    agent = _agent(request)
    if agent is None:
        policy: dict[str, object] = {name: None for name in ("policy", "policy_version", "max_model_len", "template")}
    else:
        info = agent.engine.info
        policy = {
            "policy": info.model,
            "policy_version": info.version,
            "max_model_len": info.max_model_len,
            "template": dataclasses.asdict(agent.prompt.report),
        }
    return _json({"version": _VERSION, **policy})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text: ours `agent_*`, the engine's `vllm:*`."""
    sessions = request.app.state.sessions
    reason = await _unready_reason(sessions)
    num_active = math.nan
    if reason != "store_unavailable":
        with suppress(StoreUnavailable, TimeoutError):  # replicas open and end episodes, too: the store alone knows
            async with asyncio.timeout(_STORE_LIMIT_S):
                num_active = await sessions.store.num_active()
    ACTIVE_EPISODES.set(num_active)
    agent = _agent(request)
    info = agent and agent.engine.info
    record_state(reason, _VERSION, info and info.model, info and info.version)
    TASKS.set(len(asyncio.all_tasks()))
    return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _unready_reason(sessions: Sessions) -> str | None:
    """Why what routes to it should look for another replica."""
    if reason := "draining" if sessions.leaving else sessions.unready_reason:
        return reason
    try:
        async with asyncio.timeout(_STORE_LIMIT_S):
            await sessions.store.episode("-")
    except (StoreUnavailable, TimeoutError):
        return "store_unavailable"
    return None


def _agent(request: Request) -> Agent | None:
    """None while the policy loads, whether the service drains meanwhile or not."""
    try:
        return request.app.state.sessions.agent
    except EngineUnavailable:
        return None


def _json(document: object, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
