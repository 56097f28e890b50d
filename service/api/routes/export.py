"""Owns GET /export: trajectories as NDJSON, one a line, in memory one at a time."""

from collections.abc import AsyncGenerator
from dataclasses import replace

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import StreamingResponse

from service.api.http import problems
from service.api.http.serialization import Format, document
from service.api.routes.episodes import FilterQuery
from service.errors import Gone
from service.sessions.sessions import Sessions
from service.store.base import Filter
from service.trajectory import EpisodeRecord

router = APIRouter(tags=["episodes"])

_PAGE = 100


@router.get(
    "/export",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}}
    | problems.documented(422, 503),
)
async def export(request: Request, where: FilterQuery, format: Format = "steps") -> StreamingResponse:
    """Finished trajectories (or those of another `status`), newest first, each as its /trajectory gives it.

    An export that fails midway ends without its last chunk, which every HTTP client reports.
    """
    sessions: Sessions = request.app.state.sessions
    where = replace(where, status=where.status or "ended")
    first = await sessions.page(limit=_PAGE, before=None, where=where)
    return StreamingResponse(_lines(sessions, where, first, format), media_type="application/x-ndjson")


async def _lines(sessions: Sessions, where: Filter, page: list[EpisodeRecord], format: Format) -> AsyncGenerator[bytes]:
    while page:
        for listed in page:
            try:
                record, steps = await sessions.steps(listed.config.episode_id)
            except Gone:
                continue  # deleted since its page was read
            said = await sessions.feedback(record.config.episode_id) if format == "steps" else ()
            yield orjson.dumps(document(record, steps, said, format), option=orjson.OPT_APPEND_NEWLINE)
        last = page[-1].config
        before = (last.created_at, last.episode_id)
        page = await sessions.page(limit=_PAGE, before=before, where=where)
