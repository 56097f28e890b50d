"""Owns GET /profile."""

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.http.schemas import ProfileList
from service.api.profiles import Profiles

router = APIRouter(tags=["profiles"])


@router.get("/profile", response_model=ProfileList)
async def listing(request: Request) -> Response:
    """The presets that POST /episode can be asked for by name."""
    profiles: Profiles = request.app.state.profiles
    shown = [{"name": p.name, "description": p.description, "fields": p.fields} for p in profiles]
    return Response(orjson.dumps({"profiles": shown}), media_type="application/json")
