"""The authenticated caller of a request: `security` sets it, handlers read it."""

from dataclasses import dataclass

from starlette.requests import Request

from service.access.keys import SCOPES
from service.trajectory import DEFAULT_TENANT, qualified


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant of a request and the scopes of its API key. `key_id` is None if the service runs without keys."""

    tenant: str
    scopes: frozenset[str]
    key_id: str | None = None


ANYBODY = Caller(DEFAULT_TENANT, frozenset(SCOPES))
"""The caller of every request if the service runs without keys."""


def caller(request: Request) -> Caller:
    """Returns the caller of the request."""
    return request.scope["caller"]


def own(request: Request, episode_id: str) -> str:
    """Returns the caller's episode id, qualified by its tenant, so that nobody can name another tenant's episode."""
    return qualified(caller(request).tenant, episode_id)
