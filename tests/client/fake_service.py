"""A fake service in memory, served over a real socket. Tests script faults such as lost responses."""

import asyncio
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Fault = Callable[[ASGIApp, Scope, Receive, Send], Awaitable[None]]


@dataclass
class FakeEpisode:
    fields: dict[str, Any]
    acts: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    episode_return: float = 0.0
    stop_reason: str | None = None
    success: bool | None = None
    deleted: bool = False

    @property
    def step(self) -> int:
        return sum(answer["action"] is not None for _, answer in self.acts)

    def resource(self) -> dict[str, Any]:
        status = "ended" if self.stop_reason else "active"
        own = {name: getattr(self, name) for name in ("step", "episode_return", "stop_reason", "success")}
        return {**self.fields, **own, "status": status, "a_field_of_tomorrow": 1}

    def end(self, report: dict[str, Any]) -> None:
        self.stop_reason = "terminated" if report.get("terminated") else "truncated"
        self.success = report.get("success")


def first_action(episode: FakeEpisode, body: dict[str, Any]) -> Any:
    """A policy that always takes the first legal action."""
    return body.get("legal_actions", episode.fields["action_space"].get("actions", ["a text"]))[0]


class FakeService:
    """The ASGI app. `choose` is its policy.

    `received` has (method, path, headers, body) of every request, and `peers` the addresses of the connections.
    """

    def __init__(self) -> None:
        self.choose: Callable[[FakeEpisode, dict[str, Any]], Any] = first_action
        self.episodes: dict[str, FakeEpisode] = {}
        self.received: list[tuple[str, str, dict[str, str], bytes]] = []
        self.peers: set[tuple[str, int]] = set()
        self._faults: dict[str, deque[Fault]] = {}
        self._app = Starlette(
            routes=[
                Route("/episode", self._create, methods=["POST"]),
                Route("/episode", self._list, methods=["GET"]),
                Route("/episode/{id}", self._get, methods=["GET"]),
                Route("/episode/{id}", self._delete, methods=["DELETE"]),
                Route("/episode/{id}/end", self._end, methods=["POST"]),
                Route("/episode/{id}/trajectory", self._trajectory, methods=["GET"]),
                Route("/act", self._act, methods=["POST"]),
                Route("/act/batch", self._batch, methods=["POST"]),
                Route("/readyz", self._readyz),
                Route("/version", self._version),
            ]
        )

    def clear(self) -> None:
        self.choose = first_action
        self.episodes.clear()
        self.received.clear()
        self.peers.clear()
        self._faults.clear()

    def script(self, path: str, *faults: Fault) -> None:
        """Schedules faults: each of the next requests for `path` gets one of them. Later requests are served."""
        self._faults.setdefault(path, deque()).extend(faults)

    def bodies(self, path: str) -> list[bytes]:
        return [body for _, received_path, _, body in self.received if received_path == path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = await _read(receive)
        self.peers.add(scope["client"])
        self.received.append((scope["method"], scope["path"], headers, body))

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        faults = self._faults.get(scope["path"])
        if faults:
            await faults.popleft()(self._app, scope, replay, send)
        else:
            await self._app(scope, replay, send)

    async def _create(self, request: Request) -> Response:
        fields = await request.json()
        known = self.episodes.get(fields["episode_id"])
        if known is not None and known.fields != fields:
            return problem(409, "idempotency_mismatch")
        episode = self.episodes.setdefault(fields["episode_id"], FakeEpisode(fields))
        return JSONResponse(episode.resource(), 201 if known is None else 200)

    async def _list(self, request: Request) -> Response:
        status = request.query_params.get("status")
        found = [r for r in map(FakeEpisode.resource, self.episodes.values()) if status in (None, r["status"])]
        return JSONResponse({"episodes": found[::-1], "next_cursor": None})

    async def _get(self, request: Request) -> Response:
        episode = self.episodes.get(request.path_params["id"])
        if episode is None:
            return problem(404, "episode_not_found")
        return problem(410, "episode_deleted") if episode.deleted else JSONResponse(episode.resource())

    async def _delete(self, request: Request) -> Response:
        episode = self.episodes[request.path_params["id"]]
        if episode.deleted:
            return problem(410, "episode_deleted")
        episode.deleted = True
        return Response(status_code=204)

    async def _end(self, request: Request) -> Response:
        episode = self.episodes[request.path_params["id"]]
        if episode.stop_reason is None:
            report = await request.json()
            episode.episode_return += report.get("reward", 0.0)
            episode.end(report)
        return JSONResponse(episode.resource())

    async def _trajectory(self, request: Request) -> Response:
        episode = self.episodes[request.path_params["id"]]
        steps = [{"observation": body.get("observation"), "action": answer["action"]} for body, answer in episode.acts]
        return JSONResponse({"format": request.query_params["format"], "steps": steps})

    async def _batch(self, request: Request) -> Response:
        answers = [self._act_in(body).body for body in (await request.json())["acts"]]
        return JSONResponse({"results": [json.loads(answer) for answer in answers]})

    async def _act(self, request: Request) -> Response:
        return self._act_in(await request.json())

    def _act_in(self, body: dict[str, Any]) -> Response:
        episode = self.episodes.get(body["episode_id"])
        if episode is None:
            return problem(404, "episode_not_found")
        if body["step"] < len(episode.acts):
            known, answer = episode.acts[body["step"]]
            return JSONResponse({**answer, "replayed": True}) if known == body else problem(409, "idempotency_mismatch")
        if episode.stop_reason is not None:
            return problem(409, "episode_ended", stop_reason=episode.stop_reason)
        if body["step"] != len(episode.acts):
            return problem(409, "step_conflict", expected_step=len(episode.acts))
        return JSONResponse(self._commit(episode, body))

    def _commit(self, episode: FakeEpisode, body: dict[str, Any]) -> dict[str, Any]:
        done = bool(body.get("terminated") or body.get("truncated"))
        episode.episode_return += body.get("reward", 0.0)
        answer = {
            "episode_id": body["episode_id"],
            "step": body["step"],
            "action": None if done else self.choose(episode, body),
            "done": done,
            "usage": {"prompt_tokens": 9, "cached_tokens": 8, "completion_tokens": 1},
            "timing": {"queue_s": 0.0, "engine_s": 0.001, "store_s": 0.0, "total_s": 0.001},
            "a_field_of_tomorrow": {"x": 1},
        }
        episode.acts.append((body, answer))
        if done:
            episode.end(body)
        return answer

    async def _readyz(self, request: Request) -> Response:
        return JSONResponse({"status": "ready"})

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.1.0"})


def problem(status: int, code: str, **context: Any) -> Response:
    fields = {"type": f"/problems/{code}", "title": code, "status": status, "code": code, "detail": f"About {code}."}
    return JSONResponse({**fields, "request_id": "req-7", **context}, status, media_type="application/problem+json")


def answer(response: Response) -> Fault:
    """A fault that sends this response without doing what was requested."""

    async def fault(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        await response(scope, receive, send)

    return fault


def overloaded(status: int = 503, code: str = "engine_unavailable", retry_after: str = "0") -> Fault:
    response = problem(status, code)
    response.headers["Retry-After"] = retry_after
    return answer(response)


async def drop_before(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Closes the connection without doing what was requested."""
    _cut(send)


async def drop_after(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Does what was requested, then closes the connection without a response."""
    await app(scope, receive, _discard)
    _cut(send)


def stall_after(seconds: float) -> Fault:
    """A fault that does what was requested, and closes the connection only after `seconds`, without a response."""

    async def fault(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, _discard)
        await asyncio.sleep(seconds)
        _cut(send)

    return fault


def _cut(send: Any) -> None:
    # `send` is a method of uvicorn's request cycle. ASGI itself cannot close a connection without a response.
    send.__self__.transport.abort()


async def _discard(message: Message) -> None:
    pass


async def _read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


@contextmanager
def serve(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """Serves the app over HTTP/1.1 on this loopback port, or on a free one. Yields its URL."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def decoded(bodies: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(body) for body in bodies]
