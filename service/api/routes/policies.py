"""/policy: lists the policies, loads versions of LoRA adapters, moves the names that point to them."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from service.agent.loaded_adapters import Policy as Served
from service.agent.policies import Lineage, Policies
from service.api.http import body, problems, upload
from service.api.http.answers import json_answer
from service.api.http.openapi import request_body
from service.api.http.routing import StrictRoute
from service.api.http.schemas import (
    PARENT,
    AdapterRequest,
    DefaultPolicy,
    DefaultPolicyRequest,
    PolicyList,
    PolicyVersion,
)
from service.api.http.services import services
from service.errors import Unprocessable
from service.trajectory import StoredVersion, reference
from service.validation import strict_json

router = APIRouter(tags=["policies"], route_class=StrictRoute)

NamePath = Annotated[str, Path(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="The name of the policy.")]

TAR = "application/x-tar"
_BODY = request_body(AdapterRequest)
_BODY["content"][TAR] = {"schema": {"type": "string", "format": "binary"}}
_MAX_EVALUATION = 16 << 10
"""Maximum size of an evaluation as JSON, in bytes."""


@router.get("/policy", summary="List policies", response_model=PolicyList, responses=problems.documented(503))
async def listing(request: Request) -> Response:
    """Returns the names that episodes can be opened with, the base model first, and all versions of adapters."""
    policies = _policies(request)
    await policies.refresh()
    return json_answer(
        {
            "policies": [_policy(policies, policy) for policy in policies],
            "versions": [_version(policies, version) for version in policies.catalog.versions],
            "default": policies.default,
        }
    )


@router.put(
    "/policy/{name}",
    summary="Load an adapter",
    response_model=PolicyVersion,
    responses={201: {"model": PolicyVersion, "description": "The name is new, or without `alias` the version."}}
    | problems.documented(400, 413, 422, 503),
    openapi_extra={"requestBody": _BODY},
)
async def load(
    request: Request,
    name: NamePath,
    alias: Annotated[bool, Query(description="For an upload: the field `alias`.")] = True,
    parent: Annotated[str | None, Query(pattern=PARENT, description="For an upload: the field `parent`.")] = None,
    round: Annotated[int | None, Query(ge=0, lt=2**31, description="For an upload: the field `round`.")] = None,
) -> Response:
    """Loads a LoRA adapter as a version of this name, and lets the name point to it.

    Episodes that are open keep their version, unless they were opened with `"policy_updates": "follow"`. With `"alias":
    false` the name stays as it is. `parent`, `round` and `evaluation` are stored with the version; a later call for the
    same version replaces those that it names.

    The body is JSON, or an adapter as a tar archive (`application/x-tar`) of its two files.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == TAR:
        return await _upload(request, name, Lineage(parent, round), move_alias=alias)
    if request.query_params:
        raise Unprocessable("alias, parent, round: JSON has these as fields of the body; remove the query", "query")
    parsed, _ = await body.read(request, AdapterRequest)
    policies, lineage = _policies(request), _lineage(parsed)
    if parsed.path is not None and parsed.version is None:
        policy, is_new = await policies.load(name, parsed.path, lineage, move_alias=parsed.alias)
    elif parsed.version is not None and parsed.path is None:
        policy, is_new = await policies.point(name, parsed.version, lineage, move_alias=parsed.alias)
    else:
        raise Unprocessable("path, version: give one of the two: a folder of EPISODIC_ADAPTERS, or name@digest", "path")
    return json_answer(_loaded(policies, policy), 201 if is_new else 200)


@router.post(
    "/policy/{name}/rollback",
    summary="Roll back a policy",
    response_model=PolicyVersion,
    responses=problems.documented(404, 409, 503),
)
async def rollback(request: Request, name: NamePath) -> Response:
    """Lets the name point to the version that it pointed to before. A further call goes back one more.

    The last 20 versions of a name are kept. If there is no earlier one, the answer is 409 `no_previous_version`.
    """
    policies = _policies(request)
    return json_answer(_loaded(policies, await policies.roll_back(name)))


@router.put(
    "/policy-default",
    summary="Choose the default policy",
    response_model=DefaultPolicy,
    responses=problems.documented(400, 413, 422, 503),
    openapi_extra={"requestBody": request_body(DefaultPolicyRequest)},
)
async def choose_default(request: Request) -> Response:
    """Chooses the policy of new episodes that name none. Open episodes keep theirs.

    The choice is stored, and all replicas follow it. Null leaves it to EPISODIC_DEFAULT_POLICY, or else to the base
    model.
    """
    parsed, _ = await body.read(request, DefaultPolicyRequest)
    policies = _policies(request)
    await policies.set_default(parsed.policy)
    return json_answer({"default": policies.default})


@router.delete(
    "/policy/{name}",
    summary="Remove a policy",
    status_code=204,
    responses=problems.documented(404, 409, 422, 503),
)
async def remove(request: Request, name: NamePath) -> Response:
    """Removes the name of an adapter. Its versions stay until `episodic purge` finds that no active episode uses them.

    The default policy cannot be removed (409 `policy_in_use`). Acts of episodes that follow the name get 503
    `engine_unavailable` until it exists again.
    """
    await _policies(request).remove(name)
    return Response(status_code=204)


async def _upload(request: Request, name: str, lineage: Lineage, *, move_alias: bool) -> Response:
    """Loads the adapter that the body contains."""
    policies = _policies(request)
    policies.check_name(name)  # before the body is received
    async with policies.scratch() as folder:
        archive = folder / "adapter.tar"
        await upload.save(request, archive)
        policy, is_new = await policies.load_archive(name, archive, lineage, move_alias=move_alias)
    return json_answer(_loaded(policies, policy), 201 if is_new else 200)


def _policies(request: Request) -> Policies:
    return services(request).sessions.agent.policies


def _lineage(parsed: AdapterRequest) -> Lineage:
    if parsed.evaluation is None:
        return Lineage(parsed.parent, parsed.round)
    text = strict_json.write(parsed.evaluation)
    if len(text) > _MAX_EVALUATION:
        detail = f"evaluation: {len(text)} bytes as JSON; at most {_MAX_EVALUATION} are allowed"
        raise Unprocessable(detail, "evaluation")
    return Lineage(parsed.parent, parsed.round, text.decode())


def _policy(policies: Policies, policy: Served) -> dict[str, Any]:
    previous = policies.catalog.previous.get(policy.name)
    return {
        "name": policy.name,
        "kind": "adapter" if policy.adapter else "base",
        "policy_version": policy.version,
        "base": policies.base.name,
        "rank": policy.stored and policy.stored.rank,
        "loaded_at": policy.stored and policy.stored.loaded_at,
        "version": policy.stored and policy.stored.reference,
        "previous": reference(policy.name, previous) if policy.stored and previous else None,
    }


def _loaded(policies: Policies, policy: Served) -> dict[str, Any]:
    """Returns the version as it is stored now."""
    assert policy.stored is not None  # the base model is not loaded by a call
    return _version(policies, policies.catalog.find(policy.stored.key) or policy.stored)


def _version(policies: Policies, version: StoredVersion) -> dict[str, Any]:
    return {
        "version": version.reference,
        "name": version.name,
        "kind": "adapter",
        "digest": version.digest,
        "policy_version": policies.version_of(version.digest),
        "base": policies.base.name,
        "rank": version.rank,
        "loaded_at": version.loaded_at,
        "current": policies.catalog.aliases.get(version.name) == version.digest,
        "parent": version.parent,
        "round": version.round,
        "evaluation": None if version.evaluation is None else strict_json.load(version.evaluation),
    }
