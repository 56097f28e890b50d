"""Calls for operators: health, readiness and its reasons, the version, and the OpenAPI document."""

import re
from pathlib import Path
from typing import Any

from service.api.http import problems
from service.engine.tokenizer import HFTokenizer
from service.lifecycle import Phase
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from tests.support.databases import without_table
from tests.support.serving import Served, serve


async def ready(api: Served) -> tuple[int, Any]:
    answer = await api.client.get("/readyz")
    return answer.status_code, answer.json().get("reason")


async def test_while_the_policy_loads(tmp_path: Path):
    async with serve(tmp_path, None, store=MemoryStore(), loading=True) as api:
        assert (await api.client.get("/healthz")).json() == {"status": "ok"}
        assert await ready(api) == (503, "loading")
        version = (await api.client.get("/version")).json()
        assert version["version"]
        assert (version["policy"], version["policy_version"]) == (None, None)


async def test_ready_then_each_reason_not_to_be(tmp_path: Path, tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        assert await ready(api) == (200, None)
        async with without_table(api.store_url, "episodes"):
            assert await ready(api) == (503, "store_unavailable")
        assert await ready(api) == (200, None)
        engine.die()
        assert await ready(api) == (503, "engine_unavailable")
        api.app.state.services.lifecycle.enter(Phase.LEAVING)
        assert await ready(api) == (503, "draining")
        assert (await api.client.get("/healthz")).status_code == 200


async def test_the_version_says_what_is_served(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer, max_model_len=512)) as api:
        version = (await api.client.get("/version")).json()
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", version.pop("version"))
        assert version == {
            "policy": "scripted",
            "policy_version": "scripted-1",
            "max_model_len": 512,
            "template": {"append_only": True, "canonical": True, "system_role": True, "plain": False},
        }


async def test_the_openapi_document_says_what_is_served(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        document = (await api.client.get("/openapi.json")).json()
    act = document["paths"]["/act"]["post"]
    assert {"400", "404", "409", "410", "413", "422", "503", "504"} <= set(act["responses"])
    for status in ("409", "503"):
        response = act["responses"][status]
        assert response["description"] == ", ".join(problems.CODES[int(status)])
        assert "application/problem+json" in response["content"]
    assert set(document["paths"]) == {
        *("/act", "/episode", "/episode/{episode_id}", "/episode/{episode_id}/end", "/episode/{episode_id}/trajectory"),
        *("/act/batch", "/export", "/evaluation", "/profile"),
        *("/policy", "/policy/{name}", "/policy/{name}/rollback", "/policy-default"),
        *(f"/episode/{{episode_id}}/{name}" for name in ("action", "fork", "feedback")),
        *("/", "/healthz", "/readyz", "/version", "/metrics"),
    }
    _assert_references_resolve(document, document)


def _assert_references_resolve(node: Any, document: Any) -> None:
    if isinstance(node, list):
        for item in node:
            _assert_references_resolve(item, document)
    if isinstance(node, dict):
        reference = node.get("$ref")
        if isinstance(reference, str):
            target = document
            for part in reference.removeprefix("#/").split("/"):
                assert part in target, reference
                target = target[part]
        for item in node.values():
            _assert_references_resolve(item, document)
