"""Two tenants on the real engine: neither can use the prefix cache entries of the other, in acts or in /v1."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server

TEXT = "row 0, column 0 and a long way to go " * 8


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, httpx.Client]]:
    """Clients of one server by tenant, each with the tenant's key."""
    served = {"host": "0.0.0.0", "openai__enable_prompt_tokens_details": "true"}  # noqa: S104
    server = Server(tmp_path_factory.mktemp("tenants"), **served)
    clients = {}
    for tenant in ("acme", "other"):
        headers = {"Authorization": f"Bearer {server.make_key(tenant)}"}
        clients[tenant] = httpx.Client(base_url=server.url, headers=headers, timeout=120)
    server.start()
    yield clients
    for client in clients.values():
        client.close()
    assert server.stop() == 0


def act(client: httpx.Client, episode_id: str) -> int:
    """Plays an act in a new episode. Returns the number of its prompt tokens that were in the prefix cache."""
    body: dict[str, Any] = {"episode_id": episode_id, "instructions": TEXT, "sampling": {"max_tokens": 1}}
    assert client.post("/episode", json=body).status_code == 201
    answer = client.post("/act", json={"episode_id": episode_id, "observation": "look"})
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["cached_tokens"]


def chat(client: httpx.Client, **named: str) -> int:
    """Like `act`, with a chat completion."""
    messages = [{"role": "user", "content": TEXT}]
    body = {"model": "toy-text", "messages": messages, "max_tokens": 1, **named}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return (answer.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0


@pytest.mark.parametrize("ask", [act, chat])
def test_prefix_cache_is_not_shared_between_tenants(keys: dict[str, httpx.Client], ask: Any):
    names = iter("abc")
    arguments = [(next(names),) if ask is act else () for _ in range(3)]
    assert ask(keys["acme"], *arguments[0]) == 0
    assert ask(keys["acme"], *arguments[1]) > 0
    assert ask(keys["other"], *arguments[2]) == 0


def test_caller_salt_only_splits_the_tenants_own_cache(keys: dict[str, httpx.Client]):
    assert chat(keys["acme"], cache_salt="x") == 0
    assert chat(keys["acme"], cache_salt="x") > 0
    assert chat(keys["other"], cache_salt="x") == 0


def test_key_cannot_access_another_tenants_episode(keys: dict[str, httpx.Client]):
    assert keys["acme"].post("/episode", json={"episode_id": "mine"}).status_code == 201
    assert keys["other"].get("/episode/mine").status_code == 404
    assert httpx.get(f"{keys['acme'].base_url}/episode/mine").status_code == 401
