"""Declares the filters of episodes, once for the HTTP API, the store, the client and the command line.

To add a filter, add it to `EpisodeFilter`, and add a column of the same name to the store (CONTRIBUTING.md has a
recipe). This module imports only the standard library, because the client imports it.
"""

from typing import Annotated, Any, Literal, TypedDict, get_type_hints


class EpisodeFilter(TypedDict, total=False):
    """Selects the episodes that match every given filter."""

    status: Annotated[Literal["active", "ended"], "Only episodes with this status."]
    tag: Annotated[str, "Only episodes that have this tag."]
    group: Annotated[str, "Only episodes of this group."]
    policy: Annotated[str, "Only episodes of this policy."]
    profile: Annotated[str, "Only episodes opened with this profile."]


FILTERS: dict[str, tuple[Any, str]] = {
    name: (hint.__origin__, hint.__metadata__[0])
    for name, hint in get_type_hints(EpisodeFilter, include_extras=True).items()
}
"""The type and the help text of each filter, by name."""

LABELS: tuple[str, ...] = tuple(name for name in FILTERS if name not in ("status", "tag"))
"""The filters that compare the field of the same name in the body of POST /episode."""
