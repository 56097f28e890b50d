"""A connection lives on after a response, or the response announces that it closes. Methods of every path."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from service.engine.tokenizer import HFTokenizer
from service.lifecycle import Phase
from tests.api.http.test_hostile import Caller
from tests.api.http.test_problems import BrokenEngine, assert_problem
from tests.support.serving import DISCRETE, Served, serve

UPGRADE = b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2"
LONG = b"A: " + b"a" * (1 << 17)


class BrokenApi(BrokenEngine):
    async def openai_app(self) -> Any:
        async def app(*_: Any) -> None:
            raise ZeroDivisionError("/secret/path.py is broken")

        return app


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, BrokenApi(tokenizer), max_body_bytes=1 << 16) as served:
        yield served


@pytest.fixture
async def caller(api: Served) -> AsyncIterator[Caller]:
    made = await Caller.to(api)
    yield made
    made.close()


def request(method: str, path: str, content: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


ACT = request("POST", "/act", b'{"episode_id":"e","observation":"look"}')


@pytest.mark.parametrize(("sent", "code"), [(ACT, "code"), (request("POST", "/v1/completions", b"{}"), "error")])
async def test_a_connection_lives_on_after_an_unexpected_failure(api: Served, caller: Caller, sent: bytes, code: str):
    await api.open(action_space=DISCRETE)
    for _ in range(3):
        await caller.send(sent)
        status, headers, body = await caller.response()
        assert status == 500
        assert headers["x-request-id"]
        found = json.loads(body)[code]
        assert "internal_error" in (found, found["code"] if code == "error" else None)
        assert b"secret" not in body
    await caller.send(request("GET", "/healthz"))
    assert (await caller.answer())[0] == 200


async def test_a_failure_before_the_route_is_answered_too(api: Served, caller: Caller, monkeypatch: pytest.MonkeyPatch):
    def fail(_: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api.app.state.services.admission, "count_call", fail)
    for _ in range(2):
        await caller.send(request("GET", "/episode"))
        status, _, body = await caller.response()
        assert (status, json.loads(body)["code"]) == (500, "internal_error")


@pytest.mark.parametrize("path", ["/act", "/nowhere", "/healthz", "/v1/completions", "/episode/e/end"])
async def test_a_response_to_an_incomplete_body_announces_that_the_connection_closes(
    api: Served, caller: Caller, path: str
):
    await caller.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n".encode())
    status, headers, _ = await caller.response()
    assert status in (404, 405, 413)
    assert headers["connection"] == "close"
    assert await caller.rest() == b""


async def test_a_request_behind_a_refused_body_is_not_processed(api: Served, caller: Caller):
    await caller.send(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 70000\r\n\r\n")
    assert (await caller.response())[1]["connection"] == "close"
    await caller.send(b" " * 70_000 + request("POST", "/episode", b'{"episode_id":"smuggled"}'))
    assert await caller.rest() == b""
    assert (await api.client.get("/episode/smuggled")).status_code == 404


@pytest.mark.parametrize("status", [200, 404, 413, 422])
async def test_other_responses_leave_the_connection_usable(api: Served, caller: Caller, status: int):
    sent = {
        200: request("GET", "/version"),
        404: request("GET", "/nowhere"),
        413: request("POST", "/v1/completions", b"x" * 65_000),
        422: request("POST", "/episode", b'{"unknown":1}'),
    }
    for _ in range(2):
        await caller.send(sent[status])
        answered, headers, _ = await caller.response()
        assert answered in (status, 400)
        assert "connection" not in headers


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"BREW / HTTP/1.1\r\n\r\n", 400, "malformed_request"),
        (b"POST /act HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400, "malformed_request"),
        (
            b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}",
            400,
            "malformed_request",
        ),
        (b"GET / HTTP/1.1\r\n" + LONG + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431, "headers_too_large"),
    ],
)
async def test_what_is_not_http_gets_a_problem_document(caller: Caller, sent: bytes, status: int, code: str):
    await caller.send(sent)
    answered, headers, body = await caller.response()
    document = json.loads(body)
    assert (answered, document["status"], document["code"]) == (status, status, code)
    assert headers["content-type"] == "application/problem+json"
    assert headers["connection"] == "close"
    assert document["request_id"] == headers["x-request-id"] != ""
    assert document["detail"] != document["title"] != ""
    assert await caller.rest() == b""


async def test_a_request_id_that_arrived_is_echoed(caller: Caller):
    await caller.send(b"GET / HTTP/1.1\r\nX-Request-ID: mine\r\nContent-Length: x\r\n\r\n")
    assert (await caller.response())[1]["x-request-id"] == "mine"


async def test_a_leaving_service_closes_its_connections(api: Served, caller: Caller):
    await caller.send(request("GET", "/healthz"))
    assert "connection" not in (await caller.response())[1]
    api.app.state.services.lifecycle.enter(Phase.LEAVING)
    await caller.send(request("GET", "/healthz"))
    assert (await caller.response())[1]["connection"] == "close"
    assert await caller.rest() == b""


# ---- methods


def paths(api: Served, method: str) -> list[str]:
    routes = [route for route in api.app.routes if isinstance(route, APIRoute) and method in route.methods]
    return [route.path.format(episode_id="e", name="n") for route in routes]


async def test_head_is_get_without_a_body(api: Served):
    await api.open()
    assert paths(api, "GET")
    for path in [*paths(api, "GET"), "/nowhere"]:
        got = await api.client.get(path)
        head = await api.client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers.get("content-type") == got.headers.get("content-type"), path


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/episode/e", "DELETE, GET, HEAD"),
        ("OPTIONS", "/episode", "GET, HEAD, POST"),
        ("HEAD", "/act", "POST"),
        ("POST", "/policy/n", "DELETE, PUT"),
        ("DELETE", "/healthz", "GET, HEAD"),
    ],
)
async def test_a_refused_method_lists_all_methods_of_the_path(api: Served, method: str, path: str, allowed: str):
    answer = await api.client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert_problem(answer, 405, "method_not_allowed")
