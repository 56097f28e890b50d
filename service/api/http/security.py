"""Owns who may call: the API key of a request, the scope that its route asks for, and what is let in without keys."""

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.keys import Keyring
from service.api.http import openai_errors, problems
from service.api.http.caller import ANYBODY, Caller
from service.api.http.services import services
from service.errors import EpisodicError, Forbidden, Unauthenticated
from service.store.base import StoreUnavailable

_OPEN = frozenset({"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""What orchestrators and readers of the documentation get without a key: nothing of any episode."""


def scope_of(method: str, path: str) -> str | None:
    """What a key must be allowed for this call; None where none is asked for. Whatever is added to the API needs a key
    from the start."""
    if path in _OPEN:
        return None
    reads = method in ("GET", "HEAD", "OPTIONS")
    if path == "/metrics" or (path.startswith("/policy") and not reads):
        return "admin"
    return "read" if reads else "act"


_ACTS = frozenset({"/act", "/act/batch"})


class Security:
    """Finds the caller of a request, or refuses it. Without keys the service answers this machine alone."""

    def __init__(self, app: ASGIApp, keyring: Keyring, *, loopback: bool) -> None:
        """`loopback`: the service listens on a loopback address, and may do without keys."""
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
            admission.count_calls(found.tenant)
            if scope["path"] in _ACTS:
                admission.check(found.tenant)  # before a flood's bodies are read
        except (EpisodicError, StoreUnavailable) as error:
            refuse = openai_errors.refusal if openai_errors.owns(scope["path"]) else problems.response
            await refuse(request, problems.expected(error))(scope, receive, send)
            return
        scope["caller"] = found
        await self._app(scope, receive, send)

    async def _caller(self, request: Request, needed: str) -> Caller:
        if self._loopback and not await self._keyring.exists():
            _refuse_other_sites(request)
            return ANYBODY
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        record = await self._keyring.find(key.strip()) if kind.lower() == "bearer" else None
        if record is None:
            raise Unauthenticated("unauthenticated", "Send a valid API key: Authorization: Bearer KEY.")
        if needed not in record.scopes:
            raise Forbidden("forbidden", f"The key lacks the scope {needed!r}.")
        return Caller(record.tenant, frozenset(record.scopes), record.key_id)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _refuse_other_sites(request: Request) -> None:
    """A page in this machine's browser can reach loopback: by a name of its own that resolves there (DNS rebinding), or
    by a request across sites. Programs send neither. Raises Forbidden."""
    if not _is_local(f"//{request.headers.get('host', 'localhost')}"):
        raise Forbidden("forbidden", "Without API keys the service answers to a loopback name alone; make a key.")
    origin = request.headers.get("origin")
    if origin is not None and not _is_local(origin):
        raise Forbidden("forbidden", "Without API keys the service answers no page of another site; make a key.")


@lru_cache(256)  # callers are few, and say the same at each call
def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:  # no address of any kind
        return False
