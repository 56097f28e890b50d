"""Query parameters that several routes share: the episode filters, and the cursor of keyset pagination."""

import base64
import inspect
from typing import Annotated, Any, cast

import orjson
from fastapi import Depends, Query

from service.api.http.serialization import Format
from service.errors import Unprocessable
from service.filters import FILTERS, EpisodeFilter
from service.trajectory import StoredEpisode

_MAX_LENGTH = 256


def _filter(**given: Any) -> EpisodeFilter:
    return cast("EpisodeFilter", {name: value for name, value in given.items() if value is not None})


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
FormatQuery = Annotated[
    Format,
    Query(
        description="`steps`: observations, actions, rewards and feedback. `messages`: a chat conversation. `tokens`: "
        "token ids with the loss mask and the logprobs of the behaviour policy, for training."
    ),
]
FilterQuery = Annotated[EpisodeFilter, Depends(_filter)]
"""One optional query parameter for each filter of `service.filters`."""


def cursor_of(stored: StoredEpisode) -> str:
    """Returns the opaque cursor of the page that starts after this episode."""
    place = orjson.dumps([stored.config.created_at, stored.config.episode_id])
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def read_cursor(cursor: str) -> tuple[float, str]:
    """Returns (created_at, episode_id) of the episode before the page. Raises Unprocessable for an invalid cursor."""
    try:
        created_at, episode_id = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return float(created_at), str(episode_id)
    except (ValueError, TypeError) as error:
        detail = "query parameter 'cursor': not a valid cursor. Pass the next_cursor of the previous page unchanged."
        raise Unprocessable(detail, "cursor") from error
