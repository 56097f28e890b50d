"""Hostile connections over real sockets: slow, large, malformed, or smuggling requests. Other clients are served."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from service.api.http import server
from service.api.http.problems import CODES
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import StopReason
from tests.api.routes.test_openai import EchoEngine
from tests.support.serving import DISCRETE, Served, serve, until

LIMIT_S = 0.3
SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, EchoEngine(tokenizer), receive_limit_s=LIMIT_S, max_body_bytes=1 << 16) as served:
        yield served


@pytest.fixture
async def patient(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    """A service whose receive limit is too long to matter."""
    async with serve(tmp_path, EchoEngine(tokenizer), receive_limit_s=60, max_body_bytes=1 << 16) as served:
        yield served


class Caller:
    """A connection on which a test sends and receives raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, api: Served) -> "Caller":
        host, port = api.url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def trickle(self, data: bytes) -> None:
        """Sends `data` again and again, slowly, until the server closes the connection."""
        try:
            async with asyncio.timeout(20):
                while not self._reader.at_eof() and not self._writer.is_closing():
                    self._writer.write(data)
                    await asyncio.sleep(LIMIT_S / 10)
        except ConnectionError:
            return

    async def rest(self) -> bytes:
        """Returns everything that the server sends until it closes the connection."""
        found = b""
        try:
            async with asyncio.timeout(20):
                while piece := await self._reader.read(65536):
                    found += piece
        except ConnectionError:
            pass
        return found

    async def answer(self) -> tuple[int, bytes]:
        """Returns the status and the body of the next response, which must have a Content-Length."""
        status, _, body = await self.response()
        return status, body

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """Returns the status, headers and body of the next response, which must have a Content-Length."""
        async with asyncio.timeout(20):
            status_line, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            body = await self._reader.readexactly(int(headers["content-length"]))
            return int(status_line.split()[1]), headers, body

    def close(self) -> None:
        self._writer.close()


@pytest.fixture
async def caller(api: Served) -> AsyncIterator[Caller]:
    made = await Caller.to(api)
    yield made
    made.close()


async def _is_served(api: Served) -> None:
    assert (await api.client.get("/healthz")).status_code == 200


def _chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


# ---- slow


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /healthz HTTP/1.1\r\nA: b\r\n", b"POST /a"])
async def test_missing_head_times_out(api: Served, caller: Caller, sent: bytes):
    await caller.send(sent)
    assert await caller.rest() == b""
    await _is_served(api)


async def test_slow_head_times_out(api: Served, caller: Caller):
    await caller.send(b"GET /healthz HTTP/1.1\r\nA: ")
    await caller.trickle(b"a")
    assert await caller.rest() == b""
    await _is_served(api)


async def test_line_ends_do_not_keep_a_connection(api: Served, caller: Caller):
    await caller.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await caller.answer())[0] == 200
    await caller.send(b"\r\n")
    assert await caller.rest() == b""


async def test_an_idle_connection_is_kept_for_longer_than_a_head_may_take(api: Served, caller: Caller):
    for _ in range(2):
        await caller.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await caller.answer())[0] == 200
        await asyncio.sleep(3 * LIMIT_S)


@pytest.mark.parametrize(("path", "place"), [(b"/act", ("code",)), (b"/v1/completions", ("error", "code"))])
@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
async def test_slow_body_returns_400(api: Served, caller: Caller, path: bytes, place: tuple[str, ...], framing: bytes):
    await caller.send(b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b%b\r\n\r\n" % (path, JSON, framing))
    trickling = asyncio.create_task(caller.trickle(b"1\r\n \r\n" if b"chunked" in framing else b" "))
    status, document = await caller.answer()
    found: Any = json.loads(document)
    for name in place:
        found = found[name]
    assert (status, found) == (400, "malformed_json")
    assert "did not arrive within" in document.decode()
    await trickling  # the server stops reading soon
    assert await caller.rest() == b""
    await _is_served(api)


async def test_the_rest_of_a_refused_body_is_not_read_forever(patient: Served):
    caller = await Caller.to(patient)
    await caller.send(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n")
    assert (await caller.answer())[0] == 413
    await caller.trickle(b" ")
    assert await caller.rest() == b""
    caller.close()


async def test_a_refused_body_that_comes_at_once_is_answered_without_a_reset(patient: Served):
    caller = await Caller.to(patient)
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    await caller.send(head % 4_000_000 + b" " * 4_000_000)
    status, headers, _ = await caller.response()
    assert (status, headers["connection"]) == (413, "close")
    assert await caller.rest() == b""
    caller.close()


async def test_a_caller_that_does_not_read_is_cut_off(api: Served, caller: Caller):
    """The response is larger than the socket buffers."""
    app: Any = api.app
    done = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (scope["type"], done.is_set()) == ("http", False):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            watching = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            if watching.done():
                done.set()
            watching.cancel()

    app.router.routes.insert(0, _route("/endless", endless))
    await caller.send(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await until(done.is_set)


def _route(path: str, app: Any) -> Any:
    from starlette.routing import Route

    class Whole:
        async def __call__(self, *args: Any) -> None:
            await app(*args)

    return Route(path, Whole())


# ---- large


async def test_endless_head_is_refused(patient: Served):
    caller = await Caller.to(patient)
    await caller.send(b"GET / HTTP/1.1\r\nA: " + b"a" * server.MAX_HEAD_BYTES)
    assert b"HTTP/1.1 431 " in await caller.rest()
    caller.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /%b HTTP/1.1\r\n\r\n" % (b"a" * server.MAX_HEAD_BYTES),
        b"GET / HTTP/1.1\r\nA: %b\r\n\r\n" % (b"a" * server.MAX_HEAD_BYTES),
        b"GET / HTTP/1.1\r\n%b\r\n" % (b"A: b\r\n" * (server.MAX_HEADERS + 1)),
    ],
)
async def test_a_large_head_is_refused(patient: Served, head: bytes):
    caller = await Caller.to(patient)
    await caller.send(head)
    assert b"HTTP/1.1 431 " in await caller.rest()
    caller.close()
    await _is_served(patient)


async def test_a_long_target_is_answered(patient: Served):
    assert (await patient.client.get("/" + "a" * 32_000)).status_code == 404
    assert (await patient.client.get("/episode", params={"tag": "a" * 32_000})).status_code == 422


async def test_a_body_may_be_larger_than_a_head(patient: Served):
    body = json.dumps({"episode_id": "e", "goal": "g" * 60_000}).encode()
    assert (await patient.client.post("/episode", content=body)).status_code == 201


async def test_pipelined_requests_are_limited(patient: Served):
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    caller = await Caller.to(patient)
    await caller.send(one * server.MAX_PIPELINED)
    for _ in range(server.MAX_PIPELINED):
        assert (await caller.answer())[0] == 200
    await caller.send(one * 100 * server.MAX_PIPELINED)
    assert (await caller.rest()).count(b"HTTP/1.1 200") <= server.MAX_PIPELINED
    caller.close()


# ---- contradictory or malformed


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: -1",
        b"Content-Length: +2",
        b"Content-Length: 2x",
        b"Content-Length: 0x2",
        b"Content-Length: " + b"9" * 40,
        b"Content-Length: 2\r\nContent-Length: 3",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding: chunked\r\n folded: yes",
        b"A: \x00",
    ],
)
@pytest.mark.parametrize("path", [b"/act", b"/v1/completions"])
async def test_ambiguous_message_length_is_refused(patient: Served, framing: bytes, path: bytes):
    caller = await Caller.to(patient)
    smuggled = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    await caller.send(b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n{}%b" % (path, framing, smuggled))
    answered = await caller.rest()
    assert answered.startswith(b"HTTP/1.1 400 ")
    assert answered.count(b"HTTP/1.1 ") == 1
    caller.close()


@pytest.mark.parametrize("path", [b"/act", b"/v1/completions"])
async def test_a_chunked_body_over_the_limit_is_refused(patient: Served, path: bytes):
    caller = await Caller.to(patient)
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n%bTransfer-Encoding: chunked\r\n\r\n" % (path, JSON)
    await caller.send(head + _chunked(b" " * (1 << 16) + b"{}"))
    status, document = await caller.answer()
    assert status == 413
    assert b'"payload_too_large"' in document
    caller.close()


async def test_a_body_shorter_than_its_length_takes_no_step(patient: Served):
    await patient.open(action_space=DISCRETE)
    caller = await Caller.to(patient)
    body = json.dumps({"episode_id": "e", "observation": "look"}).encode()
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (len(body) + 1)
    await caller.send(head + body)
    caller.close()
    await patient.act(step=0, observation="another")


@pytest.mark.parametrize(
    "line",
    [
        b"BREW / HTTP/1.1",
        b"get / HTTP/1.1",
        b"GET /a\x00b HTTP/1.1",
        b"GET / HTTP/9.9",
        b"\x16\x03\x01\x02",
        b"GET /\xff",
    ],
)
async def test_what_is_not_http_is_refused(patient: Served, line: bytes):
    caller = await Caller.to(patient)
    await caller.send(line + b"\r\nHost: localhost\r\n\r\n")
    assert (await caller.rest()).startswith(b"HTTP/1.1 400 ")
    caller.close()


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "SEARCH", "PATCH"])
async def test_other_methods_are_not_allowed(patient: Served, method: str):
    answer = await patient.client.request(method, "/act")
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/%ff%fe", 404),
        ("/%00", 404),
        ("/episode/%00", 422),
        ("/episode/%ff", 422),
        ("/episode/a%2fb", 404),
        ("/%2e%2e/etc", 404),
    ],
)
async def test_strange_paths_are_not_found(patient: Served, target: str, status: int):
    answer = await patient.client.get(target)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("name", ["tag", "group", "policy", "profile", "cursor"])
async def test_nul_in_query_returns_no_500(patient: Served, name: str):
    answer = await patient.client.get(f"/episode?{name}=%00%ff")
    assert answer.status_code == (422 if name == "cursor" else 200), answer.text


async def test_a_websocket_is_not_opened(patient: Served):
    caller = await Caller.to(patient)
    await caller.send(
        b"GET /act HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await caller.send(b"\x81\x05hello")
    assert (await caller.rest()).startswith(b"HTTP/1.1 405 ")
    caller.close()


async def test_a_body_behind_an_upgrade_is_refused_and_not_lost(patient: Served):
    caller = await Caller.to(patient)
    upgrade = b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n"
    await caller.send(b"POST /act HTTP/1.1\r\nHost: localhost\r\n%b\r\n{}" % upgrade)
    answered = await caller.rest()
    assert answered.startswith(b"HTTP/1.1 400 ")
    assert b"without the Upgrade header" in answered
    caller.close()


# ---- JSON and compression

LONG = b'{"model":"m","n":' + b"9" * 10_000 + b"}"


@pytest.mark.parametrize("path", ["/act", "/episode", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "content", [b"[" * 30_000, LONG, b'{"a":1e999}', b'{"a":NaN}', b'{"a":1,"a":2}', b'{"a":"\\ud800"}', b"\xff\xfe"]
)
async def test_unsupported_json_is_refused(patient: Served, path: str, content: bytes):
    """JSON that is valid but cannot be stored is 422, except for /v1, whose refusals are all 400."""
    answer = await patient.client.post(path, content=content, headers={"Content-Type": "application/json"})
    document = answer.json()
    is_storable = content != LONG and b"ud800" not in content
    expected = (400, "malformed_json") if is_storable or path.startswith("/v1") else (422, "invalid_request")
    assert (answer.status_code, document.get("code") or document["error"]["code"]) == expected


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "gzip, gzip", "x"])
@pytest.mark.parametrize("path", ["/act", "/v1/chat/completions"])
async def test_a_compressed_body_is_refused(patient: Served, path: str, coding: str):
    bomb = gzip.compress(b" " * (10 << 20))
    answer = await patient.client.post(path, content=bomb, headers={"Content-Encoding": coding})
    assert answer.status_code == 400
    assert "compressed" in answer.text
    assert ("error" in answer.json()) == path.startswith("/v1")


# ---- response headers


async def test_every_answer_has_the_security_headers(patient: Served):
    await patient.open()
    calls = {
        ("GET", "/healthz"): 200,
        ("GET", "/docs"): 200,
        ("GET", "/openapi.json"): 200,
        ("GET", "/metrics"): 200,
        ("GET", "/nowhere"): 404,
        ("POST", "/act"): 400,
        ("POST", "/v1/completions"): 200,
    }
    for (method, path), status in calls.items():
        answer = await patient.client.request(method, path)
        assert answer.status_code == status, path
        assert SECURITY.items() <= dict(answer.headers).items(), path
        assert "server" not in answer.headers
    stream = await patient.post_act(headers={"Accept": "text/event-stream"})
    unbuffered = {"cache-control": "no-store, no-transform"}
    assert (SECURITY | unbuffered).items() <= dict(stream.headers).items()
    assert stream.headers["x-accel-buffering"] == "no"
    caller = await Caller.to(patient)
    await caller.send(b"BREW / HTTP/1.1\r\n\r\n")
    refused = (await caller.rest()).decode()
    assert all(f"{name}: {value}\r\n" in refused for name, value in SECURITY.items())
    caller.close()


@pytest.mark.parametrize("docs", [True, False])
async def test_the_documentation_can_be_turned_off(tmp_path: Path, tokenizer: HFTokenizer, docs: bool):
    async with serve(tmp_path, ScriptedEngine(tokenizer), docs=docs) as api:
        for path in ("/docs", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/openapi.json"):
            assert ((await api.client.get(path)).status_code == 200) == docs, path


# ---- metric labels


def label_values() -> set[tuple[str, str]]:
    """Returns the labels of the service's metrics. Metrics are per process, so other tests add labels, too."""
    families = [family for family in REGISTRY.collect() if family.name.startswith("agent_")]
    return {label for family in families for sample in family.samples for label in sample.labels.items()}


async def test_callers_cannot_create_metric_series(patient: Served):
    """Label values are from fixed sets, whatever a caller sends."""
    before = label_values()
    await patient.open(action_space={"type": "json", "schema": {"type": "object"}})
    for number in range(3):
        await patient.post_act(f"nobody{number}", info={f"key{number}": 1})
        await patient.post_act(step=number + 5)
        await patient.client.get(f"/episode/nobody{number}")
        await patient.client.get(f"/v1/nowhere{number}")
        await patient.client.get(f"/nowhere{number}", headers={"X-Episode-Id": f"forged{number}"})
        await patient.client.request(f"BREW{number}", "/act")
    kinds = {"json", "schema", "length", *StopReason}
    known = {
        "outcome": {code for codes in CODES.values() for code in codes} | {"acted", "done", "replayed"},
        "part": {"queue_s", "engine_s", "store_s", "total_s"},
        "kind": kinds | {"prompt", "cached", "completion"},
        "stop_reason": kinds,
        "route": {"/episode", "/act", "/episode/{episode_id}", "/v1/{path:path}", "-"},
        "status": {str(status.value) for status in HTTPStatus},
    }
    for label, value in label_values() - before:
        assert value in known.get(label, ()), (label, value)
