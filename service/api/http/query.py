"""Query parameters that several routes share: the filters of episodes, and the cursor of a page."""

import base64
import inspect
from typing import Annotated, Any, cast

import orjson
from fastapi import Depends, Query

from service.errors import Unprocessable
from service.filters import FILTERS, EpisodeFilter
from service.trajectory import StoredEpisode

_MAX_LENGTH = 256


def _filter(**asked: Any) -> EpisodeFilter:
    return cast("EpisodeFilter", {name: value for name, value in asked.items() if value is not None})


_filter.__signature__ = inspect.Signature(  # type: ignore[attr-defined] - FastAPI reads it
    [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, Query(description=text, max_length=_MAX_LENGTH if kind is str else None)],
        )
        for name, (kind, text) in FILTERS.items()
    ]
)
FilterQuery = Annotated[EpisodeFilter, Depends(_filter)]
"""One query parameter for each filter of `service.filters`."""


def cursor_of(stored: StoredEpisode) -> str:
    """The cursor of the page behind this episode."""
    place = orjson.dumps([stored.config.created_at, stored.config.episode_id])
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def read_cursor(cursor: str) -> tuple[float, str]:
    """(created_at, episode_id) of the episode before the page. Raises Unprocessable."""
    try:
        created_at, episode_id = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return float(created_at), str(episode_id)
    except (ValueError, TypeError) as error:
        raise Unprocessable("the cursor is not one that this service gave", "cursor") from error
