"""A scripted service for the loop: whether a policy succeeds depends on the adapter that was uploaded."""

import asyncio
import io
import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.client.fake_service import FakeEpisode, FakeService, problem

BASE = "scripted"
BASE_SKILL = 0.5


class LoopService(FakeService):
    """Actions of a policy with the skill s are right with probability s, depending only on the seed of the episode.

    The file adapter_model.safetensors of an adapter contains its skill. `aliases` and `versions` are what was loaded,
    and `loads` the fields of each successful PUT.
    """

    def __init__(self) -> None:
        super().__init__()
        self.choose = self._choose
        self.scopes = {"act", "read", "admin"}
        self.has_adapters = True
        self.base_version = "base-1"
        self.aliases: dict[str, str] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.loads: list[dict[str, Any]] = []
        self.is_held = False
        self._held_path: str | None = None
        self._when: Callable[[], bool] = bool
        self._app.router.routes[:0] = [
            Route("/policy", self._policies),
            Route("/policy/{name}", self._put, methods=["PUT"]),
            Route("/export", self._export),
        ]

    def hold(self, path: str | None, when: Callable[[], bool]) -> None:
        """Lets requests for paths that begin with `path` wait until `release`, if `when` is true."""
        self._held_path, self._when = path, when

    def release(self) -> None:
        self._held_path, self.is_held = None, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._held_path and scope["path"].startswith(self._held_path) and self._when():
            self.is_held = True
            while self.is_held:  # noqa: ASYNC110 - the test that releases it is in another thread
                await asyncio.sleep(0.01)
        await super().__call__(scope, receive, send)

    def skill(self, policy: str) -> float:
        return BASE_SKILL if policy == BASE else self.versions[policy]["skill"]

    def tagged(self, tag: str) -> list[FakeEpisode]:
        return [episode for episode in self.episodes.values() if tag in episode.fields["tags"]]

    def _choose(self, episode: FakeEpisode, body: dict[str, Any]) -> str:
        fields = episode.fields
        seed, actions = fields["metadata"]["seed"], fields["action_space"]["actions"]
        luck = random.Random(f"{seed} {fields['episode_id'] if fields['sampling']['temperature'] else ''}").random()
        return actions[1] if luck < self.skill(fields["policy"]) else actions[0]

    async def _list(self, request: Request) -> Response:
        found = [episode.resource() for episode in self.tagged(request.query_params["tag"])]
        return JSONResponse({"episodes": [one for one in found if one["status"] == "ended"], "next_cursor": None})

    async def _export(self, request: Request) -> Response:
        found = [{"episode": episode.resource()} for episode in self.tagged(request.query_params["tag"])]
        text = "".join(json.dumps(one) + "\n" for one in found)
        return Response(text, media_type="application/x-ndjson")

    async def _policies(self, request: Request) -> Response:
        base = {"name": BASE, "kind": "base", "policy_version": self.base_version, "base": BASE}
        named = [{**base, "name": name, "kind": "adapter", "version": at} for name, at in self.aliases.items()]
        return JSONResponse({"policies": [base, *named], "versions": [], "default": BASE})

    async def _put(self, request: Request) -> Response:
        name = request.path_params["name"]
        if "admin" not in self.scopes:
            return problem(403, "forbidden")
        if not self.has_adapters:
            return problem(422, "invalid_request", errors=[{"loc": ["name"], "msg": "adapters are disabled"}])
        if request.headers["content-type"] == "application/x-tar":
            fields: dict[str, Any] = dict(request.query_params)
            with tarfile.open(fileobj=io.BytesIO(await request.body())) as archive:
                content = archive.extractfile("adapter_model.safetensors").read().decode()  # type: ignore[union-attr]
            version = f"{name}@{int(float(content) * 1000):012x}"
            self.versions.setdefault(version, {"skill": float(content)})
        else:
            fields = await request.json()
            version = fields["version"]
            if version not in self.versions:
                return problem(422, "invalid_request", errors=[{"loc": ["version"], "msg": "unknown"}])
        if fields["alias"] in (True, "true"):
            self.aliases[name] = version
        self.loads.append({**fields, "version": version})
        own = {"version": version, "name": name, "digest": version, "policy_version": version[-12:]}
        return JSONResponse({**own, "current": self.aliases.get(name) == version})
