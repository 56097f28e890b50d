"""The calls around an episode: open, list, read, record, fork, rate, end, trajectory, delete."""

import time
from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response
from uuid_utils import uuid7

from service import trajectory as trajectories
from service.api.http import body, problems, schemas, serialization
from service.api.http.acting import acting
from service.api.http.answers import json_answer
from service.api.http.caller import caller, own
from service.api.http.openapi import IDEMPOTENCY_KEY, request_body
from service.api.http.query import FilterQuery, cursor_of, read_cursor
from service.api.http.serialization import Format, resource
from service.api.http.services import services
from service.errors import Unprocessable
from service.sessions.acts import ActRequest, RecordedAction
from service.trajectory import StopReason, public_id

router = APIRouter(prefix="/episode", tags=["episodes"])

EpisodeIdPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]

_ID = "$response.body#/episode_id"
_LINKS = {
    "act": {"operationId": "acts_act", "requestBody": {"episode_id": _ID}},
    **{
        name: {"operationId": f"episodes_{name}", "parameters": {"episode_id": _ID}}
        for name in ("read", "trajectory", "record", "fork", "feedback", "end", "delete")
    },
}
"""What can be done with an episode once it is open, in OpenAPI's terms."""


@router.post(
    "",
    status_code=201,
    response_model=schemas.Episode,
    responses={
        200: {"model": schemas.Episode, "description": "The episode exists with the same body."},
        201: {"links": _LINKS},
    }
    | problems.documented(400, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.EpisodeRequest)},
)
async def create(request: Request) -> Response:
    """Opens an episode."""
    document = await body.read_document(request)
    digest = body.digest(document)
    sessions = services(request).sessions
    try:
        asked = body.validated(services(request).profiles.fill(document), schemas.EpisodeRequest)
        fields = asked.model_dump(exclude_unset=True, exclude={"episode_id"}, by_alias=True)
        stored, is_new = await sessions.create(own(request, asked.episode_id or str(uuid7())), fields, digest)
    except Unprocessable:  # a retry finds what was opened, also when its profile or policy is gone since
        known = await sessions.opened(own(request, str(document.get("episode_id"))), digest)
        if known is None:
            raise
        stored, is_new = known, False
    headers = {"Location": f"/episode/{public_id(stored.config.episode_id)}"}
    return json_answer(resource(stored), 201 if is_new else 200, headers)


@router.get("", response_model=schemas.EpisodePage, responses=problems.documented(422, 503))
async def listing(
    request: Request,
    where: FilterQuery,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: str | None = None,
) -> Response:
    """Episodes, newest first."""
    before = None if cursor is None else read_cursor(cursor)
    found = await services(request).sessions.page(caller(request).tenant, where, limit=limit, before=before)
    next_cursor = cursor_of(found[-1]) if len(found) == limit else None
    return json_answer({"episodes": [resource(stored) for stored in found], "next_cursor": next_cursor})


@router.post(
    "/{episode_id}/action",
    response_model=schemas.Act,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.RecordRequest), "parameters": [IDEMPOTENCY_KEY]},
)
async def record(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Records an action that a human or another policy chose, as the step; the policy goes on from it."""
    asked, digest = await body.read(request, schemas.RecordRequest)
    key, recorded = body.idempotency_key(request), RecordedAction(asked.action)
    act_request = ActRequest(asked.message(), digest, asked.step, key, recorded=recorded)
    async with acting(request):
        answer = await services(request).sessions.record_action(own(request, episode_id), act_request)
    return json_answer(answer)


@router.post(
    "/{episode_id}/fork",
    status_code=201,
    response_model=schemas.Forks,
    responses={200: {"model": schemas.Forks, "description": "These forks exist already."}}
    | problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.ForkRequest)},
)
async def fork(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Opens n episodes that share this one's history up to at_step (default: now)."""
    asked, digest = await body.read(request, schemas.ForkRequest)
    ids = [own(request, name) for name in asked.episode_ids or (str(uuid7()) for _ in range(asked.n))]
    if len(ids) != asked.n or len(set(ids)) < len(ids):
        raise Unprocessable(f"there must be n = {asked.n} distinct ids", "episode_ids")
    sessions = services(request).sessions
    forks, are_new = await sessions.fork(own(request, episode_id), asked.at_step, ids, asked.group, digest)
    return json_answer({"episodes": [resource(fork) for fork in forks]}, 201 if are_new else 200)


@router.post(
    "/{episode_id}/feedback",
    status_code=201,
    response_model=schemas.Feedback,
    responses=problems.documented(400, 404, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.FeedbackRequest)},
)
async def feedback(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Keeps a human's rating; a named rater's newer one for the same step takes the place of the older."""
    asked, _ = await body.read(request, schemas.FeedbackRequest)
    given = trajectories.Feedback(own(request, episode_id), created_at=time.time(), **asked.model_dump())
    await services(request).sessions.add_feedback(given)
    return json_answer(serialization.rating(given), 201)


@router.get("/{episode_id}", response_model=schemas.Episode, responses=problems.documented(404, 410, 422, 503))
async def read(request: Request, episode_id: EpisodeIdPath) -> Response:
    """The episode resource."""
    return json_answer(resource(await services(request).sessions.get(own(request, episode_id))))


@router.post(
    "/{episode_id}/end",
    response_model=schemas.Episode,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.EndRequest)},
)
async def end(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Ends the episode; an ended one stays as it is."""
    asked, digest = await body.read(request, schemas.EndRequest)
    message = asked.message()
    stop_reason = message.ends or StopReason.ABORTED
    ended = await services(request).sessions.end(own(request, episode_id), ActRequest(message, digest), stop_reason)
    return json_answer(resource(ended))


@router.get(
    "/{episode_id}/trajectory",
    responses={200: {"description": "The trajectory in the format asked for."}}
    | problems.documented(404, 410, 422, 503),
)
async def trajectory(request: Request, episode_id: EpisodeIdPath, format: Format = "steps") -> Response:
    """What happened: steps, chat messages, or token ids with loss mask and behaviour logprobs."""
    sessions = services(request).sessions
    stored, steps = await sessions.steps(own(request, episode_id))
    feedback = await sessions.feedback(stored.config.episode_id) if format == "steps" else ()
    return json_answer(serialization.document(stored, steps, feedback, format))


@router.delete("/{episode_id}", status_code=204, responses=problems.documented(404, 409, 410, 422, 503))
async def delete(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Deletes the episode; a tombstone stays."""
    await services(request).sessions.delete(own(request, episode_id))
    return Response(status_code=204)
