"""How requests reach their handlers: routes that refuse undeclared query parameters, and a shortcut to some of them."""

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from fastapi.dependencies.utils import get_flat_dependant
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unprocessable

_ANY_KEY = ".KEY"
"""A declared parameter with this ending stands for all names with the part before it and any key."""


class StrictRoute(APIRoute):
    """A route that answers 422 if the query has an unknown parameter, or the same parameter twice.

    A parameter declared as `metadata.KEY` allows `metadata.` with any key.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        names = [field.alias for field in get_flat_dependant(self.dependant).query_params]

        async def strict(request: Request) -> Response:
            if request.scope["query_string"]:
                check_query(request.query_params, names)
            return await handle(request)

        return strict


class Shortcut:
    """Middleware that calls the handlers of some paths directly.

    For an act, what Starlette's router and FastAPI's route do would take longer than the act itself. The routes remain
    for OpenAPI, and for requests with a query or another method.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Callable[[Request], Awaitable[Response]]]) -> None:
        """`handlers`: those of POST, by path."""
        self._app = app
        self._routes = {path: (handler, _Place(path)) for path, handler in handlers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None or scope["query_string"]:
            await self._app(scope, receive, send)
            return
        handler, scope["route"] = found
        response = await handler(Request(scope, receive))
        await response(scope, receive, send)


@dataclass(frozen=True, slots=True)
class _Place:
    """What log lines and metrics need of a route."""

    path: str


def check_query(query: QueryParams, names: Sequence[str]) -> None:
    """Raises Unprocessable if a parameter is none of these names, or if it is given more than once."""
    given = [name for name, _ in query.multi_items()]
    for name in given:
        if not _is_declared(name, names):
            raise _refusal(name, f"unknown parameter. {_hint(name, names)}")
        if given.count(name) > 1:
            raise _refusal(name, "given more than once. Send it once.")


def _is_declared(name: str, names: Sequence[str]) -> bool:
    prefixes = tuple(declared.removesuffix("KEY") for declared in names if declared.endswith(_ANY_KEY))
    return name in names or (bool(prefixes) and name.startswith(prefixes) and name not in prefixes)


def _hint(name: str, names: Sequence[str]) -> str:
    if not names:
        return "This call has no query parameters."
    near = get_close_matches(name, names, n=1)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return f"{meant}The parameters of this call are {', '.join(names)}."


def _refusal(name: str, message: str) -> Unprocessable:
    detail = f"query parameter {name[:100]!r}: {message}"
    return Unprocessable(detail, errors=[{"loc": ["query", name[:100]], "msg": message}])
