"""Streams an act as server-sent events: text while it is generated, then the complete answer."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.http import problems
from service.api.http.acting import ClientClosed, WhileConnected, admitted
from service.api.http.services import services
from service.engine.base import TextSink
from service.sessions.acts import ActRequest
from service.sessions.sessions import Answer
from service.validation import strict_json

EVENTS = (
    'Server-sent events. `reasoning` and `text` carry a piece of text: `{"delta": "..."}`. The last event is `act` '
    "(the answer) or `error` (a problem document). The headers are sent as soon as the act waits for the engine; an "
    "error before that is an ordinary problem response. While there is nothing else to send, a comment follows every "
    "10 seconds."
)
HEARTBEAT_S = 10.0
"""Seconds without an event after which a comment is sent, because proxies close connections that seem idle."""

_HEARTBEAT = b": waiting\n\n"
_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-transform"}
"""Tell nginx to forward each event at once, and other proxies not to compress the stream, which would buffer it."""

Delta = tuple[str, str]


class ActStream(Response):
    """The response to a streamed act. The act runs only while this response is being sent to a connected caller."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, episode_id: str, act_request: ActRequest) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._request = request
        self._episode_id = episode_id
        self._act_request = act_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the act raises, and ClientClosed, before the headers are sent."""
        begun = asyncio.Event()
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        acting = asyncio.create_task(self._act(begun, deltas))
        acting.add_done_callback(lambda _: (begun.set(), deltas.put_nowait(None)))
        try:
            async with WhileConnected(self._request):
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S):
                        await begun.wait()
                if acting.done():
                    acting.result()
            with suppress(ClientClosed):
                async with WhileConnected(self._request), aclosing(self._events(deltas, acting)) as events:
                    await self._send(events, send)
        finally:
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)

    async def _act(self, begun: asyncio.Event, deltas: "asyncio.Queue[Delta | None]") -> Answer:
        sink = TextSink(lambda kind, delta: deltas.put_nowait((kind, delta)))
        act_request = replace(self._act_request, sink=sink, on_wait=begun.set)
        with admitted(self._request):
            return await services(self._request).sessions.act(self._episode_id, act_request)

    async def _send(self, events: AsyncGenerator[bytes], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(
        self, deltas: "asyncio.Queue[Delta | None]", acting: "asyncio.Task[Answer]"
    ) -> AsyncGenerator[bytes]:
        kinds: set[str] = set()
        try:
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        delta = await deltas.get()
                except TimeoutError:
                    yield _HEARTBEAT
                    continue
                if delta is None:
                    break
                kinds.add(delta[0])
                yield _event(delta[0], {"delta": delta[1]})
            answer = acting.result()
            for kind in ("reasoning", "text"):  # not streamed: a retry, or a discrete action
                if answer[kind] and kind not in kinds:
                    yield _event(kind, {"delta": answer[kind]})
            yield _event("act", answer)
        except Exception as error:  # noqa: BLE001 - the status was sent already
            yield _event("error", problems.document(self._request, problems.expected(error)))


def _event(kind: str, data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), strict_json.write(data, default=str))
