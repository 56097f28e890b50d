"""Evaluates the episodes of a store: reads their outcomes page by page, samples their acts, and makes the report."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping

from service.errors import Unprocessable
from service.evaluation.columns import Columns
from service.evaluation.compute import Acts, compute
from service.evaluation.report import Question, Report
from service.filters import EpisodeFilter
from service.store.base import Place, StepSample, Store

_PAGE = 2_000
"""Episodes that are read in one transaction. More would delay acts."""
MAX_SAMPLED_STEPS = 20_000
"""Steps that are read for a whole report. Reading the steps of all episodes would take minutes."""
_SAMPLED_PAGE = 32
"""Episodes whose steps are read in one transaction."""
_MAX_LISTED = 20


async def evaluate(
    store: Store,
    tenant: str,
    where: EpisodeFilter,
    question: Question,
    group_of: Callable[[str | None], str | None] = lambda value: value,
) -> Report:
    """Evaluates a tenant's episodes that match a filter.

    Acts go on between two pages, and while a thread computes.

    group_of: the name of an episode's group for what it is grouped by.

    Raises Unprocessable if no selected episode is in the baseline or if too many episodes match, and StoreUnavailable.
    """
    columns = await _columns(store, tenant, where, question, group_of)
    _check_baseline(columns, question)
    acts = await _acts(store, columns)
    return await asyncio.to_thread(compute, columns, acts, question)


async def _columns(
    store: Store,
    tenant: str,
    where: EpisodeFilter,
    question: Question,
    group_of: Callable[[str | None], str | None],
) -> Columns:
    columns = Columns(group_of)
    place: Place | None = None
    while True:
        page = await store.outcomes(limit=_PAGE, after=place, tenant=tenant, where=where, by=question.by)
        await asyncio.to_thread(columns.add, page, by_tag=question.by == "tag")
        if len(page.outcomes) < _PAGE:
            return columns
        place = (page.outcomes[-1].created_at, page.outcomes[-1].episode_id)


def _check_baseline(columns: Columns, question: Question) -> None:
    if question.baseline is None or question.baseline in columns.groups or not columns.groups:
        return
    values = sorted(value for value in columns.groups if value is not None)
    listed = ", ".join(map(repr, values[:_MAX_LISTED])) + (", ..." if len(values) > _MAX_LISTED else "")
    detail = (
        f"query parameter 'baseline': no selected episode has {question.baseline[:100]!r} as its {question.by}. "
        f"The values are: {listed or 'none'}."
    )
    raise Unprocessable(detail, "query", "baseline")


async def _acts(store: Store, columns: Columns) -> Mapping[str | None, Acts]:
    """Reads some acts of each group. The groups have equal shares of the maximum number of steps."""
    share = max(MAX_SAMPLED_STEPS // max(len(columns.groups), 1), 1)
    chosen = {value: members.sample.within(share) for value, members in columns.groups.items()}
    names = list(dict.fromkeys(name for sampled in chosen.values() for name in sampled))
    steps: defaultdict[str, list[StepSample]] = defaultdict(list)
    for first in range(0, len(names), _SAMPLED_PAGE):
        for step in await store.step_samples(names[first : first + _SAMPLED_PAGE], share):
            steps[step.episode_id].append(step)
    return {value: Acts.of(step for name in sampled for step in steps[name]) for value, sampled in chosen.items()}
