"""Owns whose call a request is: what `security` found out, for the handlers behind it."""

from dataclasses import dataclass

from starlette.requests import Request

from service.access.keys import SCOPES
from service.trajectory import DEFAULT_TENANT, qualified


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is, and what its key may do; `key_id` is None where there are no keys."""

    tenant: str
    scopes: frozenset[str]
    key_id: str | None = None


ANYBODY = Caller(DEFAULT_TENANT, frozenset(SCOPES))


def caller(request: Request) -> Caller:
    return request.scope["caller"]


def own(request: Request, episode_id: str) -> str:
    """The id below the API of what the caller calls `episode_id`: nobody can name another tenant's episode."""
    return qualified(caller(request).tenant, episode_id)
