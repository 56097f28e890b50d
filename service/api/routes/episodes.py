"""Owns the calls around an episode: open, list, read, end, trajectory, delete."""

import base64
import time
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Depends, Path, Query
from starlette.requests import Request
from starlette.responses import Response
from uuid_utils import uuid7

from service import trajectory as trajectories
from service.api.http import body, problems, serialization
from service.api.http.caller import caller, own
from service.api.http.openapi import request_body
from service.api.http.schemas import (
    Act,
    EndRequest,
    Episode,
    EpisodePage,
    EpisodeRequest,
    Feedback,
    FeedbackRequest,
    ForkRequest,
    Forks,
    RecordRequest,
)
from service.api.http.serialization import Format, resource
from service.api.routes import acts
from service.errors import Unprocessable
from service.sessions.episode import Call, Recorded
from service.sessions.sessions import Sessions
from service.store.base import Filter
from service.trajectory import EpisodeRecord, StopReason, public_id

router = APIRouter(prefix="/episode", tags=["episodes"])

EpisodeIdPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
_Label = Annotated[str | None, Query(max_length=256)]


_ID = "$response.body#/episode_id"
_LINKS = {
    "act": {"operationId": "acts_act", "requestBody": {"episode_id": _ID}},
    **{
        name: {"operationId": f"episodes_{name}", "parameters": {"episode_id": _ID}}
        for name in ("read", "trajectory", "record", "fork", "feedback", "end", "delete")
    },
}
"""What can be done with an episode that was opened, as OpenAPI tells it."""


def _filter(
    request: Request,
    status: Literal["active", "ended"] | None = None,
    tag: _Label = None,
    group: _Label = None,
    policy: _Label = None,
    profile: _Label = None,
) -> Filter:
    return Filter(tenant=caller(request).tenant, status=status, tag=tag, group=group, policy=policy, profile=profile)


FilterQuery = Annotated[Filter, Depends(_filter)]


@router.post(
    "",
    status_code=201,
    response_model=Episode,
    responses={200: {"model": Episode, "description": "The episode exists with the same body."}, 201: {"links": _LINKS}}
    | problems.documented(400, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(EpisodeRequest)},
)
async def create(request: Request) -> Response:
    """Opens an episode."""
    document = await body.read_document(request)
    digest = body.digest(document)
    sessions: Sessions = request.app.state.sessions
    try:
        asked = body.validated(request.app.state.profiles.fill(document), EpisodeRequest)
        fields = asked.model_dump(exclude_unset=True, exclude={"episode_id"}, by_alias=True)
        record, is_new = await sessions.create(own(request, asked.episode_id or str(uuid7())), fields, digest)
    except Unprocessable:  # a retry finds what was opened, also when its profile or policy is gone since
        known = await sessions.opened(own(request, str(document.get("episode_id"))), digest)
        if known is None:
            raise
        record, is_new = known, False
    headers = {"Location": f"/episode/{public_id(record.config.episode_id)}"}
    return _json(resource(record), 201 if is_new else 200, headers)


@router.get("", response_model=EpisodePage, responses=problems.documented(422, 503))
async def listing(
    request: Request,
    where: FilterQuery,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: str | None = None,
) -> Response:
    """Episodes, newest first."""
    before = None if cursor is None else _read_cursor(cursor)
    records = await request.app.state.sessions.page(limit=limit, before=before, where=where)
    following = _cursor(records[-1]) if len(records) == limit else None
    return _json({"episodes": [resource(record) for record in records], "next_cursor": following})


@router.post(
    "/{episode_id}/action",
    response_model=Act,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(RecordRequest), "parameters": [acts.KEY]},
)
async def record(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Records an action that a human or another policy chose, as the step; the policy goes on from it."""
    asked, digest = await body.read(request, RecordRequest)
    key = acts.idempotency_key(request)
    call = Call(asked.message(), digest, asked.step, key, recorded=Recorded(asked.action))
    sessions: Sessions = request.app.state.sessions
    recording = acts.admitted(request, lambda: sessions.record(own(request, episode_id), call))
    return await acts.answered(request, recording)


@router.post(
    "/{episode_id}/fork",
    status_code=201,
    response_model=Forks,
    responses={200: {"model": Forks, "description": "These forks exist already."}}
    | problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(ForkRequest)},
)
async def fork(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Opens n episodes that share this one's history up to at_step (default: now)."""
    asked, digest = await body.read(request, ForkRequest)
    ids = [own(request, name) for name in asked.episode_ids or (str(uuid7()) for _ in range(asked.n))]
    if len(ids) != asked.n or len(set(ids)) < len(ids):
        raise Unprocessable(f"there must be n = {asked.n} distinct ids", "episode_ids")
    sessions: Sessions = request.app.state.sessions
    records, new = await sessions.fork(own(request, episode_id), asked.at_step, ids, asked.group, digest)
    return _json({"episodes": [resource(record) for record in records]}, 201 if new else 200)


@router.post(
    "/{episode_id}/feedback",
    status_code=201,
    response_model=Feedback,
    responses=problems.documented(400, 404, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(FeedbackRequest)},
)
async def feedback(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Keeps a human's rating; a named rater's newer one for the same step takes the place of the older."""
    asked, _ = await body.read(request, FeedbackRequest)
    said = trajectories.Feedback(own(request, episode_id), created_at=time.time(), **asked.model_dump())
    await request.app.state.sessions.add_feedback(said)
    return _json(serialization.rating(said), 201)


@router.get("/{episode_id}", response_model=Episode, responses=problems.documented(404, 410, 422, 503))
async def read(request: Request, episode_id: EpisodeIdPath) -> Response:
    """The episode resource."""
    return _json(resource(await request.app.state.sessions.get(own(request, episode_id))))


@router.post(
    "/{episode_id}/end",
    response_model=Episode,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(EndRequest)},
)
async def end(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Ends the episode; an ended one stays as it is."""
    asked, digest = await body.read(request, EndRequest)
    message, sessions = asked.message(), request.app.state.sessions
    call = Call(message, digest)
    record = await sessions.end(own(request, episode_id), call, message.ends or StopReason.ABORTED)
    return _json(resource(record))


@router.get(
    "/{episode_id}/trajectory",
    responses={200: {"description": "The trajectory in the format asked for."}}
    | problems.documented(404, 410, 422, 503),
)
async def trajectory(request: Request, episode_id: EpisodeIdPath, format: Format = "steps") -> Response:
    """What happened: steps, chat messages, or token ids with loss mask and behaviour logprobs."""
    sessions: Sessions = request.app.state.sessions
    record, steps = await sessions.steps(own(request, episode_id))
    said = await sessions.feedback(record.config.episode_id) if format == "steps" else ()
    return _json(serialization.document(record, steps, said, format))


@router.delete("/{episode_id}", status_code=204, responses=problems.documented(404, 409, 410, 422, 503))
async def delete(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Deletes the episode; a tombstone stays."""
    await request.app.state.sessions.delete(own(request, episode_id))
    return Response(status_code=204)


def _json(document: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(document), status, headers, media_type="application/json")


def _cursor(record: EpisodeRecord) -> str:
    place = orjson.dumps([record.config.created_at, record.config.episode_id])
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def _read_cursor(cursor: str) -> tuple[float, str]:
    try:
        created_at, episode_id = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return float(created_at), str(episode_id)
    except (ValueError, TypeError) as error:
        raise Unprocessable("the cursor is not one that this service gave", "cursor") from error
