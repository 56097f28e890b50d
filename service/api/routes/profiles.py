"""GET /profile: lists the profiles, the named presets for POST /episode."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.http import problems
from service.api.http.answers import json_answer
from service.api.http.routing import StrictRoute
from service.api.http.schemas import ProfileList
from service.api.http.services import services

router = APIRouter(tags=["profiles"], route_class=StrictRoute)


@router.get("/profile", summary="List profiles", response_model=ProfileList, responses=problems.documented())
async def listing(request: Request) -> Response:
    """Returns the profiles: presets that POST /episode can use by name."""
    profiles = services(request).profiles
    return json_answer(
        {"profiles": [{"name": p.name, "description": p.description, "fields": p.fields} for p in profiles]}
    )
