"""GET /evaluation: summarizes the caller's episodes by policy or another label, and compares the groups."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from service.api.http import problems
from service.api.http.acting import WhileConnected
from service.api.http.answers import long_answer
from service.api.http.caller import caller
from service.api.http.media_types import accepts
from service.api.http.query import FilterQuery
from service.api.http.reports import Evaluation
from service.api.http.routing import StrictRoute
from service.api.http.services import services
from service.evaluation.markdown import as_markdown
from service.evaluation.report import Question
from service.filters import EVALUATION, MAX_TEXT, By, Metric

router = APIRouter(tags=["episodes"], route_class=StrictRoute)

_MARKDOWN = "text/markdown"


def _help(name: str) -> str:
    return EVALUATION[name][1]


@router.get(
    "/evaluation",
    summary="Evaluate episodes",
    response_model=Evaluation,
    responses={200: {"content": {_MARKDOWN: {"schema": {"type": "string"}}}}} | problems.documented(422, 503),
)
async def evaluation(
    request: Request,
    where: FilterQuery,
    by: Annotated[By, Query(description=_help("by"))] = "policy",
    baseline: Annotated[str | None, Query(description=_help("baseline"), max_length=MAX_TEXT)] = None,
    metric: Annotated[Metric | None, Query(description=_help("metric"))] = None,
    level: Annotated[float, Query(description=_help("level"), gt=0, lt=1)] = 0.95,
) -> Response:
    """Returns the completion rate, return, length, human ratings and costs of each group, with confidence intervals.

    With a `baseline`, every other group is compared with it, on the same seeds if both have played some of them. With
    `Accept: text/markdown`, the answer is a report that can be pasted into a pull request.
    """
    await request.body()
    async with WhileConnected(request):
        question = Question(by, baseline, metric, level)
        report = await services(request).sessions.evaluate(caller(request).tenant, where, question)
    if accepts(request, _MARKDOWN):
        return Response(await asyncio.to_thread(as_markdown, report), media_type=_MARKDOWN)
    return await long_answer(report.as_json)
