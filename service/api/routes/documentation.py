"""GET / describes the service; /openapi.json and /docs describe its calls. They load nothing from other hosts."""

from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.api.http import problems
from service.api.http.answers import json_answer
from service.api.http.media_types import accepts
from service.api.http.openapi import VERSION, as_json
from service.api.http.routing import StrictRoute
from service.api.http.schemas import Description
from service.api.http.services import services

_SWAGGER_UI = files("service.packaged") / "swagger_ui"
_DOCS = {"docs": "/docs", "openapi": "/openapi.json"}
_LINKS = {
    "health": "/healthz",
    "ready": "/readyz",
    "version": "/version",
    "episodes": "/episode",
    "models": "/v1/models",
}

index = APIRouter(tags=["operations"], route_class=StrictRoute)
router = APIRouter(include_in_schema=False, route_class=StrictRoute)
"""The routes that EPISODIC_DOCS turns off."""


@index.get("/", summary="Describe the service", response_model=Description, responses=problems.documented(public=True))
async def describe(request: Request) -> Response:
    """Returns the name and version of the service, and links to its calls. Browsers are redirected to /docs."""
    has_docs = services(request).settings.docs
    if has_docs and accepts(request, "text/html"):
        return RedirectResponse("docs")
    links = {**(_DOCS if has_docs else {}), **_LINKS}
    return json_answer({"name": "episodic", "version": VERSION, "description": request.app.summary, "links": links})


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    return Response(as_json(request.app), media_type="application/json")


@router.get("/docs")
async def docs(request: Request) -> Response:
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{request.app.title} API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},  # otherwise the page sends its own address to swagger.io
    )


@router.get("/redoc")
async def redoc() -> Response:
    return RedirectResponse("docs")


@router.get("/docs/swagger-ui-bundle.js")
async def script() -> Response:
    return Response(_file("swagger-ui-bundle.js"), media_type="text/javascript")


@router.get("/docs/swagger-ui.css")
async def style() -> Response:
    return Response(_file("swagger-ui.css"), media_type="text/css")


@cache
def _file(name: str) -> bytes:
    return (_SWAGGER_UI / name).read_bytes()
