"""Owns the calls around an episode: open, list, read, end, trajectory, delete."""

import base64
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response
from uuid_utils import uuid7

from service.api import body, problems
from service.api.formats import FORMATS
from service.api.openapi import request_body
from service.api.schemas import EndRequest, Episode, EpisodePage, EpisodeRequest
from service.episode import Call, resource
from service.errors import Unprocessable
from service.trajectory import EpisodeRecord, StopReason

router = APIRouter(prefix="/episode", tags=["episodes"])

EpisodeIdPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


@router.post(
    "",
    status_code=201,
    response_model=Episode,
    responses={200: {"model": Episode, "description": "The episode exists with the same body."}}
    | problems.documented(400, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(EpisodeRequest)},
)
async def create(request: Request) -> Response:
    """Opens an episode."""
    asked, digest = await body.read(request, EpisodeRequest)
    fields = asked.model_dump(exclude_unset=True, exclude={"episode_id"}, by_alias=True)
    record, is_new = await request.app.state.sessions.create(asked.episode_id or str(uuid7()), fields, digest)
    headers = {"Location": f"/episode/{record.config.episode_id}"}
    return _json(resource(record), 201 if is_new else 200, headers)


@router.get("", response_model=EpisodePage, responses=problems.documented(422, 503))
async def listing(
    request: Request,
    status: Literal["active", "ended"] | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: str | None = None,
) -> Response:
    """Episodes, newest first."""
    before = None if cursor is None else _read_cursor(cursor)
    records = await request.app.state.sessions.page(limit=limit, before=before, status=status)
    following = _cursor(records[-1]) if len(records) == limit else None
    return _json({"episodes": [resource(record) for record in records], "next_cursor": following})


@router.get("/{episode_id}", response_model=Episode, responses=problems.documented(404, 410, 422, 503))
async def read(request: Request, episode_id: EpisodeIdPath) -> Response:
    """The episode resource."""
    return _json(resource(await request.app.state.sessions.get(episode_id)))


@router.post(
    "/{episode_id}/end",
    response_model=Episode,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(EndRequest)},
)
async def end(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Ends the episode; an ended one stays as it is."""
    asked, digest = await body.read(request, EndRequest)
    message = asked.message()
    record = await request.app.state.sessions.end(episode_id, Call(message, digest), message.ends or StopReason.ABORTED)
    return _json(resource(record))


@router.get(
    "/{episode_id}/trajectory",
    responses={200: {"description": "The trajectory in the format asked for."}}
    | problems.documented(404, 410, 422, 503),
)
async def trajectory(
    request: Request, episode_id: EpisodeIdPath, format: Literal["steps", "messages", "tokens"] = "steps"
) -> Response:
    """What happened: steps, chat messages, or token ids with loss mask and behaviour logprobs."""
    record, steps = await request.app.state.sessions.steps(episode_id)
    return _json({"episode": resource(record), "format": format, **FORMATS[format](record, steps)})


@router.delete("/{episode_id}", status_code=204, responses=problems.documented(404, 409, 410, 422, 503))
async def delete(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Deletes the episode; a tombstone stays."""
    await request.app.state.sessions.delete(episode_id)
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
