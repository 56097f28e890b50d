"""Declares how episodes are selected and sorted, once for the HTTP API, the store, the clients and the command line.

To add a filter, add it to `EpisodeFilter`, and add a column of the same name to the store (CONTRIBUTING.md has a
recipe). This module imports only the standard library, because the client imports it.
"""

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

Scalar = str | float | bool | None
"""A JSON value that is not a list or an object."""
Time = datetime | float | str
"""A point in time. As text: ISO 8601, in UTC if it has no offset, or Unix seconds. A number: Unix seconds."""

Sort = Literal["created", "return", "length", "rating"]
Order = Literal["asc", "desc"]
By = Literal["policy", "policy_version", "profile", "tag", "group", "env"]
Metric = Literal["completion", "return"]


class EpisodeFilter(TypedDict, total=False):
    """Selects the episodes that match every given filter."""

    status: Annotated[Literal["active", "ended"], "Only episodes with this status."]
    tag: Annotated[str, "Only episodes that have this tag."]
    group: Annotated[str, "Only episodes of this group."]
    policy: Annotated[str, "Only episodes of this policy."]
    profile: Annotated[str, "Only episodes opened with this profile."]
    env: Annotated[str, "Only episodes with this value of `env` in their metadata."]
    success: Annotated[bool, "Only episodes that ended with this success."]
    since: Annotated[Time, "Only episodes opened at this time or later: ISO 8601 (default: UTC) or Unix seconds."]
    until: Annotated[Time, "Only episodes opened before this time: ISO 8601 (default: UTC) or Unix seconds."]
    metadata: Annotated[Mapping[str, Scalar], "Only episodes with this value of KEY in their metadata."]


class EpisodeOrder(TypedDict, total=False):
    """How a list of episodes is sorted. The default is the newest episode first."""

    sort: Annotated[Sort, "What to sort by: time of creation, return, number of steps, or mean rating."]
    order: Annotated[Order, "Ascending or descending. Episodes without a rating are last in either order."]


class EpisodeQuery(EpisodeFilter, EpisodeOrder, total=False):
    """Which episodes to list, and how the list is sorted."""


class EvaluationOptions(TypedDict, total=False):
    """How an evaluation divides episodes into groups, and which comparisons it makes."""

    by: Annotated[By, "What divides the episodes into groups. Default: policy."]
    baseline: Annotated[str, "Compare every other group with this one: a value of what divides the episodes."]
    metric: Annotated[Metric, "Compare only the completion rate, or only the return. Default: both."]
    level: Annotated[float, "Confidence level of intervals and tests, between 0 and 1. Default: 0.95."]


class EvaluationQuery(EpisodeFilter, EvaluationOptions, total=False):
    """Which episodes to evaluate, and how."""


def _declared(kind: type[Any]) -> dict[str, tuple[Any, str]]:
    hints = get_type_hints(kind, include_extras=True).items()
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints}


FILTERS: dict[str, tuple[Any, str]] = _declared(EpisodeFilter)
"""The type and the help text of each filter, by name."""

ORDERS: dict[str, tuple[Any, str]] = _declared(EpisodeOrder)
"""The type and the help text of `sort` and `order`."""

EVALUATION: dict[str, tuple[Any, str]] = _declared(EvaluationOptions)
"""The type and the help text of each option of an evaluation."""

SORTS: tuple[Sort, ...] = get_args(Sort)

LABELS: tuple[str, ...] = tuple(name for name, (kind, _) in FILTERS.items() if kind is str and name != "tag")
"""The filters that compare a text: the field of the same name in the body of POST /episode, or in its metadata."""

NO_RESULT = ("aborted", "idle_ttl")
"""The stop reasons of episodes that were given up: their return and success say nothing about the policy."""

MAX_TEXT = 256
"""Maximum number of characters of a value to filter by."""
MAX_KEY = 128
"""Maximum number of characters of a metadata key to filter by."""
_MAX_ENTRIES = 64

_IN_METADATA = ("env", "seed")
_LOST_PLUS = re.compile(r"(T[\d:.,]+) (\d\d:?\d\d)")


def labels_of(request: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns the labels of an episode, and `seed`, from the body of POST /episode. A missing label is None."""
    metadata: Mapping[str, Any] = request.get("metadata") or {}
    texts = metadata_of(request)
    inside = {name: None if metadata.get(name) is None else texts.get(name) for name in _IN_METADATA}
    return {**{name: request.get(name) for name in LABELS}, **inside}


def metadata_of(request: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata of an episode that can be filtered by: at most 64 entries, as text (see `as_text`).

    Lists, objects, texts and keys that are too long, and those with a NUL, which PostgreSQL cannot store, are left out.
    `env` and `seed` have priority.
    """
    metadata: Mapping[str, Any] = request.get("metadata") or {}
    names = sorted(metadata, key=lambda name: name not in _IN_METADATA)
    texts = ((name, as_text(metadata[name])) for name in names if len(name) <= MAX_KEY)
    usable = ((name, text) for name, text in texts if text is not None and len(text) <= MAX_TEXT)
    return dict(islice((item for item in usable if "\0" not in "".join(item)), _MAX_ENTRIES))


def as_text(value: Any) -> str | None:
    """Returns the text that stands for a JSON value when values are compared: a string itself, or the JSON text of a
    number, a boolean or null. Returns None for a list or an object."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else None


def unix_seconds(time: Time) -> float:
    """Converts a point in time to Unix seconds. Raises ValueError for a text that is neither ISO 8601 nor a number."""
    if isinstance(time, datetime):
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    try:
        seconds = float(time)
    except ValueError:
        # In a URL, an unescaped + means a space.
        return unix_seconds(datetime.fromisoformat(_LOST_PLUS.sub(r"\1+\2", str(time))))
    if not math.isfinite(seconds):
        raise ValueError(f"{time} is not a point in time")
    return seconds
