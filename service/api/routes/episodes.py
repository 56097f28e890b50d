"""/episode: opens, lists, reads, forks, rates, ends and deletes episodes, records actions, returns trajectories."""

import re
import time
from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response
from uuid_utils import uuid7

from service import trajectory as trajectories
from service.api.http import body, problems, schemas, serialization
from service.api.http.acting import WhileConnected, admitted
from service.api.http.answers import json_answer, long_answer
from service.api.http.caller import caller, own
from service.api.http.openapi import IDEMPOTENCY_KEY, RATING_KEY, request_body
from service.api.http.query import FilterQuery, FormatQuery, OrderQuery, cursor_of, read_cursor
from service.api.http.routing import StrictRoute
from service.api.http.serialization import Window, resource
from service.api.http.services import services
from service.errors import Unprocessable
from service.sessions.acts import ActRequest, RecordedAction
from service.trajectory import StopReason, StoredEpisode, public_id

router = APIRouter(prefix="/episode", tags=["episodes"], route_class=StrictRoute)

EpisodeIdPath = Annotated[str, Path(pattern=schemas.EPISODE_ID, description="The id of the episode.")]

_ID = "$response.body#/episode_id"
_LINKS = {
    "act": {"operationId": "acts_act", "requestBody": {"episode_id": _ID}},
    **{
        name: {"operationId": f"episodes_{name}", "parameters": {"episode_id": _ID}}
        for name in ("read", "trajectory", "record", "fork", "feedback", "end", "delete")
    },
}
"""OpenAPI links: the calls that can follow once an episode is open."""


@router.post(
    "",
    summary="Open an episode",
    status_code=201,
    response_model=schemas.Episode,
    responses={
        200: {"model": schemas.Episode, "description": "A retry: the same body opened this episode earlier."},
        201: {"links": _LINKS},
    }
    | problems.documented(400, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.EpisodeRequest)},
)
async def create(request: Request) -> Response:
    """Opens an episode. Every field is optional.

    To make retries safe, choose `episode_id`: the same body then returns the episode that exists (200). Another body
    with the same id is refused (409 `idempotency_mismatch`).
    """
    document = await body.read_document(request, may_be_empty=True)
    digest = body.digest(document)
    sessions = services(request).sessions
    try:
        parsed = body.validated(services(request).profiles.fill(document), schemas.EpisodeRequest)
        fields = parsed.model_dump(exclude_unset=True, exclude={"episode_id"}, by_alias=True)
        stored, is_new = await sessions.create(own(request, parsed.episode_id or str(uuid7())), fields, digest)
    except Unprocessable:  # a retry still finds its episode if the profile or the policy was removed meanwhile
        known = await _opened(request, document.get("episode_id"), digest)
        if known is None:
            raise
        stored, is_new = known, False
    headers = {"Location": f"/episode/{public_id(stored.config.episode_id)}"}
    return json_answer(resource(stored), 201 if is_new else 200, headers)


async def _opened(request: Request, episode_id: object, digest: bytes) -> StoredEpisode | None:
    """Returns the episode that an earlier request with this digest opened, or None."""
    if not isinstance(episode_id, str) or not re.fullmatch(schemas.EPISODE_ID, episode_id):
        return None
    return await services(request).sessions.opened(own(request, episode_id), digest)


@router.get("", summary="List episodes", response_model=schemas.EpisodePage, responses=problems.documented(422, 503))
async def listing(
    request: Request,
    where: FilterQuery,
    ordering: OrderQuery,
    limit: Annotated[int, Query(ge=1, le=1000, description="Maximum number of episodes in the page.")] = 100,
    cursor: Annotated[
        str | None, Query(description="`next_cursor` of the previous page; leave it out for the first page.")
    ] = None,
) -> Response:
    """Returns a page of the caller's episodes that match all filters, by default the newest first."""
    before = None if cursor is None else read_cursor(cursor, ordering)
    sessions, tenant = services(request).sessions, caller(request).tenant
    found, place = await sessions.page(tenant, where, limit=limit, before=before, ordering=ordering)
    next_cursor = None if place is None else cursor_of(place, ordering)
    return await long_answer(lambda: {"episodes": [*map(resource, found)], "next_cursor": next_cursor})


@router.post(
    "/{episode_id}/action",
    summary="Record an action",
    response_model=schemas.Act,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.RecordRequest), "parameters": [IDEMPOTENCY_KEY]},
)
async def record(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Records an action that a human or another policy chose as the next step. The policy continues from it."""
    parsed, digest = await body.read(request, schemas.RecordRequest)
    key, recorded = body.idempotency_key(request), RecordedAction(parsed.action)
    act_request = ActRequest(parsed.message(), digest, parsed.step, key, recorded=recorded)
    async with WhileConnected(request):
        with admitted(request):
            return json_answer(await services(request).sessions.act(own(request, episode_id), act_request))


@router.post(
    "/{episode_id}/fork",
    summary="Fork an episode",
    status_code=201,
    response_model=schemas.Forks,
    responses={200: {"model": schemas.Forks, "description": "A retry: the same body opened these forks earlier."}}
    | problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.ForkRequest)},
)
async def fork(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Opens `n` new episodes that share this episode's steps before `at_step` (default: all) and continue from there.

    With a seed, the first fork draws the same actions as this episode would. Each other fork gets its own seed.
    """
    parsed, digest = await body.read(request, schemas.ForkRequest)
    ids = [own(request, name) for name in parsed.episode_ids or (str(uuid7()) for _ in range(parsed.n))]
    if len(ids) != parsed.n or len(set(ids)) < len(ids):
        detail = f"episode_ids: expected n = {parsed.n} distinct ids, got {len(ids)} ({len(set(ids))} distinct)"
        raise Unprocessable(detail, "episode_ids")
    sessions = services(request).sessions
    forks, are_new = await sessions.fork(own(request, episode_id), parsed.at_step, ids, parsed.group, digest)
    return await long_answer(lambda: {"episodes": [*map(resource, forks)]}, 201 if are_new else 200)


@router.post(
    "/{episode_id}/feedback",
    summary="Rate an episode or a step",
    status_code=201,
    response_model=schemas.Feedback,
    responses={200: {"model": schemas.Feedback, "description": "A retry: this rating was stored earlier."}}
    | problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.FeedbackRequest), "parameters": [RATING_KEY]},
)
async def feedback(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Stores a human's rating. If the same `rater` rates the same step again, the new rating replaces the old one."""
    parsed, _ = await body.read(request, schemas.FeedbackRequest)
    key, fields = body.idempotency_key(request), parsed.model_dump()
    given = trajectories.Feedback(own(request, episode_id), created_at=time.time(), idempotency_key=key, **fields)
    stored, is_new = await services(request).sessions.add_feedback(given)
    return json_answer(serialization.rating(stored), 201 if is_new else 200)


@router.get(
    "/{episode_id}",
    summary="Read an episode",
    response_model=schemas.Episode,
    responses=problems.documented(404, 410, 422, 503),
)
async def read(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Returns the episode with its current state, without its steps."""
    return json_answer(resource(await services(request).sessions.get(own(request, episode_id))))


@router.post(
    "/{episode_id}/end",
    summary="End an episode",
    response_model=schemas.Episode,
    responses=problems.documented(400, 404, 409, 410, 413, 422, 503),
    openapi_extra={"requestBody": request_body(schemas.EndRequest)},
)
async def end(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Ends the episode without another action. An episode that has already ended is returned unchanged."""
    parsed, digest = await body.read(request, schemas.EndRequest)
    message = parsed.message()
    stop_reason = message.ends or StopReason.ABORTED
    ended = await services(request).sessions.end(own(request, episode_id), ActRequest(message, digest), stop_reason)
    return json_answer(resource(ended))


@router.get(
    "/{episode_id}/trajectory",
    summary="Read a trajectory",
    responses={200: {"model": schemas.Trajectory, "description": "The trajectory in the requested format."}}
    | problems.documented(404, 410, 422, 503),
)
async def trajectory(
    request: Request,
    episode_id: EpisodeIdPath,
    format: FormatQuery = "steps",
    from_step: Annotated[int, Query(ge=0, lt=2**31, description="Index of the first step.")] = 0,
    limit: Annotated[
        int | None, Query(ge=1, le=10_000, description="Maximum number of steps. By default all are returned.")
    ] = None,
) -> Response:
    """Returns the steps of the episode in one of three formats.

    `from_step` and `limit` select a page of the formats `steps` and `messages`. `next_step` of the answer is the
    `from_step` of the next page, or null. The format `tokens` has no pages, because a segment repeats earlier steps.
    """
    sessions, name = services(request).sessions, own(request, episode_id)
    window = Window(from_step, limit) if from_step or limit else None
    if window and format == "tokens":
        detail = "from_step and limit: the format 'tokens' has no pages. Leave them out, or use 'steps' or 'messages'."
        raise Unprocessable(detail, "query", "from_step" if from_step else "limit")
    # The reward of a page's last step is in the message of the step after it.
    stored, steps = await sessions.steps(name, from_step, window and window.end)
    feedback = await sessions.feedback(name) if format in serialization.RATED else ()
    return await long_answer(lambda: serialization.document(stored, steps, feedback, format, window))


@router.delete(
    "/{episode_id}",
    summary="Delete an episode",
    status_code=204,
    responses=problems.documented(404, 409, 410, 422, 503),
)
async def delete(request: Request, episode_id: EpisodeIdPath) -> Response:
    """Deletes the episode and its steps. A tombstone remains: later calls with this id get 410 `episode_deleted`."""
    await services(request).sessions.delete(own(request, episode_id))
    return Response(status_code=204)
