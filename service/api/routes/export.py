"""GET /export: streams trajectories as NDJSON, one per line. Only one trajectory is in memory at a time."""

from collections.abc import AsyncGenerator
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import StreamingResponse

from service.api.http import problems
from service.api.http.answers import serialized
from service.api.http.caller import caller
from service.api.http.query import FilterQuery, FormatQuery
from service.api.http.routing import StrictRoute
from service.api.http.serialization import RATED, Format, document
from service.api.http.services import services
from service.errors import Gone
from service.filters import EpisodeFilter
from service.sessions.sessions import Sessions
from service.store.base import Place
from service.trajectory import StoredEpisode

router = APIRouter(tags=["episodes"], route_class=StrictRoute)

_PAGE = 100


@router.get(
    "/export",
    summary="Export trajectories",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}}
    | problems.documented(422, 503),
)
async def export(request: Request, where: FilterQuery, format: FormatQuery = "steps") -> StreamingResponse:
    """Returns the trajectories of all matching episodes as NDJSON, newest first. The default `status` is `ended`.

    Each line is what GET /episode/{episode_id}/trajectory returns. If the export fails midway, the response ends
    without its last chunk, and HTTP clients report an incomplete response.
    """
    sessions, tenant = services(request).sessions, caller(request).tenant
    where["status"] = where.get("status", "ended")
    first = await sessions.page(tenant, where, limit=_PAGE)
    return StreamingResponse(_lines(sessions, tenant, where, first, format), media_type="application/x-ndjson")


async def _lines(
    sessions: Sessions,
    tenant: str,
    where: EpisodeFilter,
    page: tuple[list[StoredEpisode], Place | None],
    format: Format,
) -> AsyncGenerator[bytes]:
    while True:
        found, place = page
        for listed in found:
            try:
                stored, steps = await sessions.steps(listed.config.episode_id)
            except Gone:
                continue  # deleted after its page was read
            feedback = await sessions.feedback(stored.config.episode_id) if format in RATED else ()
            yield await serialized(partial(document, stored, steps, feedback, format)) + b"\n"
        if place is None:
            return
        page = await sessions.page(tenant, where, limit=_PAGE, before=place)
