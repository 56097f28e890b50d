"""/policy: lists the served policies, and loads and removes LoRA adapters."""

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from service.agent.policies import Policies
from service.agent.policies import Policy as Served
from service.api.http import body, problems
from service.api.http.answers import json_answer
from service.api.http.openapi import request_body
from service.api.http.routing import StrictRoute
from service.api.http.schemas import AdapterRequest, Policy, PolicyList
from service.api.http.services import services

router = APIRouter(prefix="/policy", tags=["policies"], route_class=StrictRoute)

NamePath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="The name of the policy.")]


@router.get("", summary="List policies", response_model=PolicyList, responses=problems.documented(503))
async def listing(request: Request) -> Response:
    """Returns the policies that episodes can be opened with: the base model, then its adapters."""
    policies = _policies(request)
    return json_answer({"policies": [_resource(policies, policy) for policy in policies]})


@router.put(
    "/{name}",
    summary="Load an adapter",
    response_model=Policy,
    responses={201: {"model": Policy, "description": "A new adapter was loaded."}}
    | problems.documented(400, 413, 422, 503),
    openapi_extra={"requestBody": request_body(AdapterRequest)},
)
async def load(request: Request, name: NamePath) -> Response:
    """Loads a LoRA adapter under a name, or replaces the adapter of that name.

    Acts that are in flight end with the previous weights. `policy_version` of each step names the weights that acted.
    """
    parsed, _ = await body.read(request, AdapterRequest)
    policies = _policies(request)
    policy, is_new = await policies.load(name, parsed.path)
    return json_answer(_resource(policies, policy), 201 if is_new else 200)


@router.delete("/{name}", summary="Remove an adapter", status_code=204, responses=problems.documented(404, 422, 503))
async def remove(request: Request, name: NamePath) -> Response:
    """Removes an adapter. Acts of its episodes get 503 `engine_unavailable` until it is loaded again."""
    await _policies(request).remove(name)
    return Response(status_code=204)


def _policies(request: Request) -> Policies:
    return services(request).sessions.agent.policies


def _resource(policies: Policies, policy: Served) -> dict[str, object]:
    return {
        "name": policy.name,
        "kind": "adapter" if policy.adapter else "base",
        "policy_version": policy.version,
        "base": policies.base.name,
        "rank": policy.adapter.rank if policy.adapter else None,
        "loaded_at": policy.loaded_at,
    }
