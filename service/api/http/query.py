"""Query parameters that several routes share: filters and order of episodes, and the cursor of keyset pagination."""

import base64
import inspect
from datetime import datetime
from typing import Annotated, Any, cast

import orjson
from fastapi import Depends, Query
from starlette.requests import Request

from service.api.http.serialization import Format
from service.errors import Unprocessable
from service.filters import FILTERS, MAX_KEY, MAX_TEXT, ORDERS, SORTS, EpisodeFilter, Time, unix_seconds
from service.store.base import NEWEST_FIRST, Ordering, Place

_METADATA = "metadata."


def _parameter(name: str, kind: Any, text: str) -> inspect.Parameter:
    """Returns the parameter of the query for a filter or an order, as FastAPI reads it from a signature."""
    alias = None
    if kind == Time:
        kind = str
    elif name == "metadata":
        kind, alias = str, f"{_METADATA}KEY"
        text = f"{text} KEY is any key. Numbers, booleans and null are written as in JSON."
    query = Query(description=text, max_length=MAX_TEXT if kind is str else None, alias=alias)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, query]
    )


def _filter(request: Request, **given: Any) -> EpisodeFilter:
    where = {name: value for name, value in given.items() if value is not None and name != "metadata"}
    for name, value in where.items():
        if FILTERS[name][0] == Time:
            where[name] = _time(name, value)
    if metadata := _metadata(request):
        where["metadata"] = metadata
    return cast("EpisodeFilter", where)


def _time(name: str, text: str) -> float:
    try:
        return unix_seconds(text)
    except (ValueError, OverflowError) as error:
        now = datetime.now().astimezone()
        detail = (
            f"query parameter {name!r}: {text[:100]!r} is not a point in time. Use ISO 8601, for example "
            f"{now.isoformat(timespec='seconds')}, or Unix seconds, for example {now.timestamp():.0f}."
        )
        raise Unprocessable(detail, "query", name) from error


def _metadata(request: Request) -> dict[str, str]:
    found = {
        name.removeprefix(_METADATA): value
        for name, value in request.query_params.multi_items()
        if name.startswith(_METADATA)
    }
    for key, value in found.items():
        if len(key) > MAX_KEY or len(value) > MAX_TEXT:
            detail = (
                f"query parameter {_METADATA + key[:100]!r}: a key has at most {MAX_KEY} characters, and a value "
                f"{MAX_TEXT}. Longer ones cannot be filtered by."
            )
            raise Unprocessable(detail, "query", _METADATA + key[:100])
    return found


def _ordering(**given: Any) -> Ordering:
    return Ordering(**{name: value for name, value in given.items() if value is not None})


_REQUEST = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Request)
_filter.__signature__ = inspect.Signature(  # type: ignore[attr-defined] - FastAPI reads it
    [_REQUEST, *(_parameter(name, kind, text) for name, (kind, text) in FILTERS.items())]
)
_ordering.__signature__ = inspect.Signature(  # type: ignore[attr-defined] - FastAPI reads it
    [_parameter(name, kind, text) for name, (kind, text) in ORDERS.items()]
)
FormatQuery = Annotated[
    Format,
    Query(
        description="`steps`: observations, actions, rewards and feedback. `messages`: a chat conversation. `tokens`: "
        "token ids with the loss mask and the logprobs of the behaviour policy, for training."
    ),
]
FilterQuery = Annotated[EpisodeFilter, Depends(_filter)]
"""One optional query parameter for each filter of `service.filters`."""
OrderQuery = Annotated[Ordering, Depends(_ordering)]
"""The optional query parameters `sort` and `order`."""


def cursor_of(place: Place, ordering: Ordering) -> str:
    """Returns the opaque cursor of the page that starts after this place."""
    # The default order has the cursor of earlier versions, so that old and new replicas can serve pages of one list.
    prefix = () if ordering == NEWEST_FIRST else (ordering.sort, ordering.order)
    return base64.urlsafe_b64encode(orjson.dumps([*prefix, *place])).decode().rstrip("=")


def read_cursor(cursor: str, ordering: Ordering) -> Place:
    """Returns the place that the cursor stands for. Raises Unprocessable for an invalid cursor, and for the cursor of a
    list that is sorted in another way."""
    try:
        parts = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        made_for, parts = (Ordering(*parts[:2]), parts[2:]) if parts[0] in SORTS else (NEWEST_FIRST, parts)
        *numbers, episode_id = parts
        if len(numbers) != (1 if made_for.sort == "created" else 2):
            raise ValueError("the cursor has a wrong number of parts")
        place = cast("Place", (*(float(number) for number in numbers), str(episode_id)))
    except (ValueError, TypeError, LookupError) as error:
        detail = "query parameter 'cursor': not a valid cursor. Pass the next_cursor of the previous page unchanged."
        raise Unprocessable(detail, "cursor") from error
    if made_for != ordering:
        detail = (
            f"query parameter 'cursor': it belongs to a list with sort={made_for.sort} and order={made_for.order}. "
            "Use the same sort and order for all pages, or leave out the cursor."
        )
        raise Unprocessable(detail, "cursor")
    return place
