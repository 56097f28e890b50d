"""The services that routes use, with typed access from a request."""

from dataclasses import dataclass

from starlette.requests import Request

from service.access.admission import Admission
from service.lifecycle import Lifecycle
from service.sessions.profiles import Profiles
from service.sessions.sessions import Sessions
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """All services that a route may use."""

    settings: Settings
    lifecycle: Lifecycle
    admission: Admission
    sessions: Sessions
    profiles: Profiles


def services(request: Request) -> Services:
    """Returns the services of the app that received the request. `middleware.RequestContext` puts them there."""
    return request.scope["services"]
