"""Authenticates API keys and checks the scope of a call. Without keys, limits access to programs on this machine."""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.keys import Keyring
from service.api.http import problems
from service.api.http.caller import ANYBODY, Caller
from service.api.http.services import services
from service.errors import EpisodicError, Forbidden, Unauthenticated
from service.store.base import StoreUnavailable

_DOCS = ("/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/redoc", "/openapi.json")
_OPEN = frozenset({"/", "/healthz", "/readyz", *_DOCS})
"""Public paths: health checks and documentation. They show nothing about episodes."""


def scope_of(method: str, path: str) -> str | None:
    """Returns the scope that a key needs for this call; None for a public path. New paths need a key by default."""
    if path in _OPEN:
        return None
    reads = method in ("GET", "HEAD", "OPTIONS")
    if path == "/metrics" or (path.startswith("/policy") and not reads):
        return "admin"
    return "read" if reads else "act"


_ACTS = frozenset({"/act", "/act/batch"})
_CREATE_KEY = "To allow more callers, create an API key: episodic keys create"


class Security:
    """Middleware that authenticates the caller, checks its scope, and applies its rate limit.

    Without API keys, only programs on this machine may call the service.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, *, loopback: bool) -> None:
        """`loopback`: whether the service listens on a loopback address. If so, it may run without keys."""
        self._app = app
        self._keyring = keyring
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = scope_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if needed is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            found = await self._caller(request, needed)
            admission = services(request).admission
            admission.count_call(found.tenant)
            if scope["path"] in _ACTS:
                admission.check(found.tenant)  # before the body is read, so that refusing an overload is cheap
        except (EpisodicError, StoreUnavailable) as error:
            await problems.refusal(request, error)(scope, receive, send)
            return
        scope["caller"] = found
        await self._app(scope, receive, send)

    async def _caller(self, request: Request, needed: str) -> Caller:
        if self._loopback and not await self._keyring.exists():
            _refuse_other_sites(request, services(request).settings.cors_origins)
            return ANYBODY
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        record = await self._keyring.find(key.strip()) if kind.lower() == "bearer" else None
        if record is None:
            detail = "The API key is missing, unknown or revoked. Send a valid one: Authorization: Bearer KEY."
            raise Unauthenticated("unauthenticated", detail)
        if needed not in record.scopes:
            raise Forbidden("forbidden", f"The API key does not have the scope {needed!r}. Use a key that has it.")
        return Caller(record.tenant, frozenset(record.scopes), record.key_id)


def is_loopback(host: str) -> bool:
    """Returns whether the address is a loopback address, which only this machine can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _refuse_other_sites(request: Request, allowed: Sequence[str]) -> None:
    """Refuses requests that a foreign web page sends from a browser on this machine. Raises Forbidden.

    A page can reach a loopback address by DNS rebinding (then Host is a foreign name) or by a cross-site request (then
    Origin is a foreign site). Programs other than browsers send neither. `allowed`: origins that the operator trusts;
    "*" is not one of them, because then every page could use the service.
    """
    if not _is_local(f"//{request.headers.get('host', 'localhost')}"):
        detail = f"Header Host: without API keys it must be localhost or a loopback address. {_CREATE_KEY}"
        raise Forbidden("forbidden", detail)
    origin = request.headers.get("origin")
    if origin is not None and origin not in allowed and not _is_local(origin):
        detail = f"Header Origin: without API keys, web pages of other sites are refused. {_CREATE_KEY}"
        raise Forbidden("forbidden", detail)


@lru_cache(256)  # few callers, and each sends the same headers with every request
def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:  # not a URL
        return False
