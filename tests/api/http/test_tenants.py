"""API keys over real HTTP: the scope that each call requires, the isolation of tenants, and quotas."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from service.access.keys import SCOPES, new_key
from service.api.http.security import scope_of
from service.app import create_app
from service.cli.main import app as command_line
from service.engine.tokenizer import HFTokenizer
from service.settings import Settings
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import DISCRETE, HeldEngine, Served, serve, until

OPEN = {("get", "/"), ("get", "/healthz"), ("get", "/readyz")}
OPERATIONS = [
    (method, path)
    for path, methods in create_app(Settings(), store=MemoryStore()).openapi()["paths"].items()
    for method in methods
]
BODIES: dict[str, Any] = {
    "/act": {"episode_id": "e", "observation": "look", "step": 1},
    "/act/batch": {"acts": [{"episode_id": "e", "observation": "look", "step": 1}]},
    "/episode/{episode_id}/action": {"observation": "look", "action": "left"},
    "/episode/{episode_id}/fork": {"n": 1},
    "/episode/{episode_id}/feedback": {"rating": 5},
    "/episode/{episode_id}/end": {},
}
OF_AN_EPISODE = [operation for operation in OPERATIONS if "{episode_id}" in operation[1] or operation[1] == "/act"]


class Keyed(Served):
    """A service that requires API keys."""

    async def headers(self, tenant: str, *scopes: Any) -> dict[str, str]:
        """Creates a key (default: with all scopes) and returns the headers that send it."""
        key, record = new_key(tenant, scopes or SCOPES, 1.0)
        await self.app.state.services.sessions.store.add_key(record)
        return {"Authorization": f"Bearer {key}"}


@pytest.fixture(autouse=True)
def _fresh_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the service read the keys at each call instead of once per second."""
    monkeypatch.setattr("service.access.keys.FRESH_S", 0.0)


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Keyed]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield Keyed(served.app, served.url, served.client)


def call(api: Served, method: str, path: str, headers: dict[str, str]) -> Any:
    target = path.replace("{episode_id}", "e").replace("{name}", "scripted")
    body = BODIES.get(path, {}) if method in ("post", "put") else None
    return api.client.request(method, target, json=body, headers=headers)


async def test_every_call_needs_a_key_once_a_key_exists(api: Keyed):
    await api.headers("acme")
    for wrong in ({}, {"Authorization": "Bearer ek_0000000000000000_00"}, {"Authorization": "Basic YTpi"}):
        for method, path in OPERATIONS:
            answer = await call(api, method, path, wrong)
            if (method, path) in OPEN:
                assert answer.status_code == 200
                continue
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.headers["X-Request-ID"] == answer.json()["request_id"]
    for path in ("/v1/models", "/v1/chat/completions", "/tokenize", "/score", "/nowhere"):
        assert (await api.client.post(path, json={})).status_code == 401, path


async def test_a_scope_allows_only_its_own_calls(api: Keyed):
    for scope in SCOPES:
        headers = await api.headers("acme", scope)
        for method, path in OPERATIONS:
            needed = scope_of(method.upper(), path)
            answer = await call(api, method, path, headers)
            is_forbidden = answer.status_code == 403 and answer.json()["code"] == "forbidden"
            assert is_forbidden == (needed not in (None, scope)), (scope, method, path, answer.text)


def test_policy_changes_and_metrics_need_scope_admin():
    asked = {operation: scope_of(operation[0].upper(), operation[1]) for operation in OPERATIONS}
    changes = {("put", "/policy/{name}"), ("delete", "/policy/{name}"), ("post", "/policy/{name}/rollback")}
    admins = {*changes, ("put", "/policy-default"), ("get", "/metrics")}
    assert {operation for operation, scope in asked.items() if scope == "admin"} == admins
    assert {operation for operation, scope in asked.items() if scope is None} == OPEN
    assert all(
        scope == "read" for (method, _), scope in asked.items() if method == "get" and scope not in ("admin", None)
    )


@pytest.mark.parametrize("method_and_path", OF_AN_EPISODE, ids=" ".join)
async def test_episode_of_another_tenant_returns_404(api: Keyed, method_and_path: tuple[str, str]):
    """Every call that names an episode answers as if the other tenant's episode did not exist."""
    api.client.headers.update(await api.headers("acme"))
    await api.open("e", action_space=DISCRETE, tags=["secret"])
    await api.act("e")
    before = await api.trajectory("e")
    stranger = await api.headers("other")
    answer = await call(api, *method_and_path, stranger)
    assert (answer.status_code, answer.json()["code"]) == (404, "episode_not_found")
    assert answer.json()["detail"] == "There is no episode 'e'. Check the id and the API key's tenant."
    assert await api.trajectory("e") == before


async def test_lists_exports_and_batches_contain_only_the_tenants_episodes(api: Keyed):
    mine, theirs = await api.headers("acme"), await api.headers("other")
    api.client.headers.update(mine)
    for name in ("e", "f"):
        await api.open(name, tags=["t"], group="g")
        await api.act(name)
    for query in ("", "?tag=t", "?group=g", "?status=active", "?limit=1"):
        listed = (await api.client.get(f"/episode{query}", headers=theirs)).json()
        assert listed == {"episodes": [], "next_cursor": None}
    cursor = (await api.client.get("/episode?limit=1")).json()["next_cursor"]
    assert (await api.client.get(f"/episode?cursor={cursor}", headers=theirs)).json()["episodes"] == []
    assert (await api.client.get("/export?status=active", headers=theirs)).text == ""
    assert len((await api.client.get("/export?status=active")).text.splitlines()) == 2
    answer = await call(api, "post", "/act/batch", theirs)
    assert [result["code"] for result in answer.json()["results"]] == ["episode_not_found"]


async def test_tenants_may_choose_the_same_id(api: Keyed):
    for tenant in ("acme", "other", "default"):
        api.client.headers.update(await api.headers(tenant))
        created = await api.open("e", goal=tenant)
        assert (created["episode_id"], created["goal"]) == ("e", tenant)
        answer = await api.act("e", observation=tenant)
        assert (answer["episode_id"], answer["step"]) == ("e", 0)
        forked = (await api.client.post("/episode/e/fork", json={"episode_ids": ["f"]})).json()["episodes"][0]
        assert (forked["episode_id"], forked["parent"]["episode_id"], forked["group"]) == ("f", "e", "e")
        rated = (await api.client.post("/episode/e/feedback", json={"rating": 5})).json()
        assert rated["episode_id"] == "e"
        document = await api.trajectory("e")
        assert [step["observation"] for step in document["steps"]] == [tenant]
        assert ":" not in json.dumps([document["episode"]["episode_id"], document["feedback"][0]["episode_id"]])


async def test_each_tenants_prefix_cache_has_a_salt_of_its_own(api: Keyed):
    salts: list[set[str | None]] = []
    for tenant in ("acme", "other", "default"):
        api.client.headers.update(await api.headers(tenant))
        await api.open("text")
        await api.act("text")
        await api.open("thought", reasoning={"max_tokens": 4}, action_space=DISCRETE)
        await api.act("thought")
        salts.append(set(api.engine.cache_salts))
        api.engine.cache_salts.clear()
    assert [len(used) for used in salts] == [1, 1, 1]
    assert len(set.union(*salts)) == 3
    assert salts[2] == {None}  # the default tenant has no salt, as without keys


async def test_revoking_the_last_key_does_not_open_the_service(api: Keyed):
    headers = await api.headers("acme")
    store = api.app.state.services.sessions.store
    assert (await api.client.get("/episode", headers=headers)).status_code == 200
    key_id = headers["Authorization"].split("_")[1]
    assert await store.revoke_key(key_id, 2.0)
    assert not await store.revoke_key(key_id, 3.0)
    assert (await api.client.get("/episode", headers=headers)).status_code == 401
    assert (await api.client.get("/episode")).status_code == 401


async def test_foreign_web_pages_are_refused_without_keys(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        for headers in (
            {"Host": "rebound.example:8000"},
            {"Host": "[::1"},
            {"Origin": "https://page.example"},
            {"Origin": "null"},
        ):
            answer = await api.client.post("/episode", json={}, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), headers
        for headers in ({"Host": "localhost:1"}, {"Host": "[::1]:8000"}, {"Origin": "http://localhost:3000"}):
            assert (await api.client.post("/episode", json={}, headers=headers)).status_code == 201, headers


async def test_an_address_that_others_reach_needs_a_key_whatever_the_caller_says(
    tmp_path: Path, tokenizer: HFTokenizer
):
    """Only `host` decides, not the Host header. The command line refuses to start such a service without keys, but the
    keys may be revoked later."""
    async with serve(tmp_path, ScriptedEngine(tokenizer), host="0.0.0.0") as api:  # noqa: S104
        assert (await api.client.get("/episode", headers={"Host": "localhost"})).status_code == 401


def test_serve_without_keys_refuses_a_public_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))
    command = [sys.executable, "-m", "service", "serve", "--host", "0.0.0.0"]  # noqa: S104
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "episodic keys create" in refused.stderr


def test_keys_are_made_listed_and_revoked_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))

    def run(*words: str) -> Any:
        return CliRunner().invoke(command_line, ["keys", *words])

    made = run("create", "--tenant", "acme", "--scopes", "read")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    prefix, key_id, secret = key.split("_")
    assert (prefix, len(bytes.fromhex(secret))) == ("ek", 32)
    listed = run("list").output
    assert key_id in listed
    assert "acme" in listed
    assert secret not in listed
    assert secret.encode() not in (tmp_path / "episodic.db").read_bytes()
    assert run("revoke", key_id).exit_code == 0
    assert run("revoke", key_id).exit_code == 1
    for wrong in (["--tenant", "A:b"], ["--scopes", "act,all"], ["--tenant", ""]):
        assert run("create", *wrong).exit_code == 2, wrong


async def test_exceeded_quota_returns_429_with_retry_after(tmp_path: Path, tokenizer: HFTokenizer):
    quotas = {"acme": {"active_episodes": 2, "concurrent_acts": 1}, "slow": {"calls_per_s": 0.5}}
    engine = HeldEngine(tokenizer)
    async with serve(tmp_path, engine, tenants=quotas) as served:
        api = Keyed(served.app, served.url, served.client)
        acme, slow = await api.headers("acme"), await api.headers("slow")
        api.client.headers.update(acme)
        await api.open("e")
        await api.open("f")
        refused = await api.client.post("/episode", json={})
        assert_refused(refused, "quota_exceeded", "2 active episodes")
        assert_refused(await api.client.post("/episode/e/fork", json={}), "quota_exceeded", "2 active episodes")
        assert (await api.client.post("/episode", json={"episode_id": "e"})).status_code == 200  # a retry
        acting = asyncio.create_task(api.post_act("e"))
        await until(lambda: engine.num_held == 1)
        assert_refused(await api.post_act("f"), "quota_exceeded", "1 concurrent acts")
        engine.release.set()
        assert (await acting).status_code == 200
        assert (await api.post_act("f")).status_code == 200
        assert (await api.client.post("/episode/f/end", json={})).status_code == 200
        await api.open("g")
        assert (await api.client.get("/episode", headers=slow)).status_code == 200
        limited = await api.client.get("/episode", headers=slow)
        assert_refused(limited, "rate_limited", "0.5 calls per second")
        assert int(limited.headers["Retry-After"]) == 2
        assert (await api.client.get("/healthz")).status_code == 200


def assert_refused(answer: httpx.Response, code: str, detail: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (429, code), answer.text
    assert detail in answer.json()["detail"]
    assert int(answer.headers["Retry-After"]) >= 1
