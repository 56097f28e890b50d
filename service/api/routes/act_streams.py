"""An act as a stream of server-sent events: deltas of text as they are drawn, then the act."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.http import problems
from service.api.http.acting import ClientClosed, while_connected
from service.api.http.caller import caller
from service.api.http.services import services
from service.engine.base import TextSink
from service.sessions.acts import ActRequest
from service.sessions.sessions import Answer

EVENTS = "Server-sent events `reasoning` and `text` ({delta}), then one `act`, or `error` (a problem)."
_UNBUFFERED = {"X-Accel-Buffering": "no"}
"""For nginx: it passes each event on at once."""

Delta = tuple[str, str]


async def stream(request: Request, episode_id: str, act_request: ActRequest) -> Response:
    """Events from the first one on. A failure before it is answered like that of any other call."""
    deltas: asyncio.Queue[Delta | None] = asyncio.Queue()

    def emit(kind: str, delta: str) -> None:
        deltas.put_nowait((kind, delta))

    acting = asyncio.create_task(_act(request, episode_id, replace(act_request, sink=TextSink(emit))))
    acting.add_done_callback(lambda _: deltas.put_nowait(None))
    try:
        async with while_connected(request):
            first = await deltas.get()
    except (ClientClosed, asyncio.CancelledError):
        await _cancelled(acting)
        raise
    if first is None:
        acting.result()  # raises what the act failed with
    return StreamingResponse(
        _events(request, first, deltas, acting), media_type="text/event-stream", headers=_UNBUFFERED
    )


async def _act(request: Request, episode_id: str, act_request: ActRequest) -> Answer:
    with services(request).admission.admitted(caller(request).tenant):
        return await services(request).sessions.act(episode_id, act_request)


async def _events(
    request: Request, item: Delta | None, deltas: "asyncio.Queue[Delta | None]", acting: "asyncio.Task[Answer]"
) -> AsyncGenerator[bytes]:
    """When the reader of these events goes away, the act is cancelled."""
    kinds: set[str] = set()
    try:
        while item is not None:
            kinds.add(item[0])
            yield _event(item[0], {"delta": item[1]})
            item = await deltas.get()
        answer = acting.result()
        for kind in ("reasoning", "text"):  # a stored or joined act, or an action that was not drawn token by token
            if answer[kind] and kind not in kinds:
                yield _event(kind, {"delta": answer[kind]})
        yield _event("act", answer)
    except Exception as error:  # noqa: BLE001 - the status line was sent long ago
        yield _event("error", problems.document(request, problems.expected(error)))
    finally:
        await _cancelled(acting)


def _event(kind: str, data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data, default=str))


async def _cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
