"""GET /, the OpenAPI document and its page; and web pages of other sites, which CORS allows or refuses."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.access.keys import SCOPES, new_key
from service.api.http.openapi import VERSION
from service.api.http.problems import CODES
from service.engine.tokenizer import HFTokenizer
from service.settings import Settings
from service.testing.scripted_engine import ScriptedEngine
from tests.api.http.test_connections import BrokenApi
from tests.api.http.test_problems import assert_problem
from tests.support.serving import DISCRETE, Served, serve

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
ORIGIN = "https://app.example"


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


async def keyed(api: Served) -> dict[str, str]:
    """Creates an API key, and returns the header with it."""
    key, record = new_key("default", SCOPES, 1.0)
    await api.app.state.services.sessions.store.add_key(record)
    return {"Authorization": f"Bearer {key}"}


# ---- GET /


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/plain", "text/html;q=0"])
async def test_the_root_describes_the_service(api: Served, accept: str):
    answer = await api.client.get("/", headers={"Accept": accept})
    assert answer.status_code == 200
    document = answer.json()
    assert (document["name"], document["version"]) == ("episodic", VERSION)
    assert document["links"]["docs"] == "/docs"
    for link in document["links"].values():
        assert (await api.client.get(link)).status_code in (200, 501), link  # 501: /v1 of the scripted engine


async def test_browsers_are_redirected_to_the_documentation(api: Served):
    answer = await api.client.get("/", headers=BROWSER)
    assert answer.is_redirect
    page = await api.client.get("/", headers=BROWSER, follow_redirects=True)
    assert (page.status_code, page.url.path) == (200, "/docs")


async def test_without_documentation_browsers_get_the_description(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer), docs=False) as api:
        answer = await api.client.get("/", headers=BROWSER)
        assert answer.status_code == 200
        assert not {"docs", "openapi"} & answer.json()["links"].keys()


async def test_the_root_needs_no_key(api: Served):
    await keyed(api)
    for path in ("/", "/docs", "/openapi.json", "/docs/swagger-ui.css"):
        assert (await api.client.get(path)).status_code == 200
    assert_problem(await api.client.get("/version"), 401, "unauthenticated")


# ---- the OpenAPI document


async def test_the_openapi_document_is_made_once(api: Served, monkeypatch: pytest.MonkeyPatch):
    first = await api.client.get("/openapi.json")
    monkeypatch.setattr(api.app, "openapi", lambda: pytest.fail("it was made again"))
    assert (await api.client.get("/openapi.json")).content == first.content
    assert first.json()["info"]["version"] == VERSION


async def test_the_openapi_document_is_complete(api: Served):
    document = (await api.client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in schemas
    assert schemas["BatchRequest"]["properties"]["acts"]["items"] == {"$ref": "#/components/schemas/ActRequest"}
    assert "AdapterRequest" in json.dumps(document["paths"]["/policy/{name}"]["put"]["requestBody"])
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            public = path in ("/", "/healthz", "/readyz")
            assert call["responses"].keys() >= {"422", "500", *(() if public else ("401", "403", "429"))}, (
                method,
                path,
            )
            errors = [
                status for status in call["responses"] if status >= "400" and (path, status) != ("/readyz", "503")
            ]
            for status in errors:
                assert call["responses"][status]["description"] == ", ".join(CODES[int(status)]), (path, status)
    optional = {path for path, methods in document["paths"].items() if _body(methods).get("required") is False}
    assert optional == {"/episode", "/episode/{episode_id}/fork", "/episode/{episode_id}/end"}


def _body(methods: dict[str, Any]) -> dict[str, Any]:
    return methods.get("post", {}).get("requestBody", {})


async def test_the_page_of_the_documentation_loads_nothing_from_other_hosts(api: Served):
    page = await api.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page.text)
    loaded = re.findall(r"""(?:src|href)=["']([^"':]+)["']""", page.text)
    assert loaded
    for name in [*loaded, "openapi.json"]:
        assert name in page.text
        answer = await api.client.get(f"/{name}")
        assert (answer.status_code, len(answer.content) > 1000) == (200, True), name


# ---- CORS


async def test_without_the_setting_no_origin_is_allowed(api: Served):
    key = await keyed(api)
    answer = await api.client.get("/version", headers={**key, "Origin": ORIGIN})
    assert "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert (await api.client.options("/act", headers={**key, **preflight})).status_code == 405


@pytest.mark.parametrize("has_key", [True, False])
async def test_a_page_of_an_allowed_origin_may_call(tmp_path: Path, tokenizer: HFTokenizer, has_key: bool):
    async with serve(tmp_path, BrokenApi(tokenizer), cors_origins=[ORIGIN]) as api:
        key = await keyed(api) if has_key else {}
        preflight = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,x-episode-id",
        }
        asked = await api.client.options("/act", headers=preflight)  # a browser sends no key with it
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == ORIGIN
        assert "idempotency-key" in asked.headers["access-control-allow-headers"].lower()
        assert asked.headers["x-request-id"]
        opened = await api.client.post("/episode", json={"action_space": DISCRETE}, headers={**key, "Origin": ORIGIN})
        act = {"episode_id": opened.json()["episode_id"], "observation": "look"}
        failed = await api.client.post("/act", json=act, headers={**key, "Origin": ORIGIN})
        missing = await api.client.get("/nowhere", headers={**key, "Origin": ORIGIN})
        assert [answer.status_code for answer in (opened, failed, missing)] == [201, 500, 404]
        for answer in (opened, failed, missing):
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        other = await api.client.get("/version", headers={**key, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        assert other.status_code == (200 if has_key else 403)


async def test_every_origin_is_allowed_only_with_keys(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer), cors_origins=["*"]) as api:
        assert_problem(await api.client.get("/version", headers={"Origin": ORIGIN}), 403, "forbidden")
        await keyed(api)
    async with serve(tmp_path, ScriptedEngine(tokenizer), cors_origins=["*"]) as api:
        key = await keyed(api)
        answer = await api.client.get("/version", headers={**key, "Origin": ORIGIN})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://app.example/path", "", "http://a b"]
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str):
    with pytest.raises(ValidationError, match="SCHEME://HOST"):
        Settings(cors_origins=[origin])
