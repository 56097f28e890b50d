"""Streams an act as server-sent events: text while it is generated, then the complete answer."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.http import problems
from service.api.http.acting import ClientClosed, while_connected
from service.api.http.caller import caller
from service.api.http.services import services
from service.engine.base import TextSink
from service.sessions.acts import ActRequest
from service.sessions.sessions import Answer
from service.validation import strict_json

EVENTS = (
    'Server-sent events. `reasoning` and `text` carry a piece of text: `{"delta": "..."}`. The last event is `act` '
    "(the answer) or `error` (a problem document). An error before the first event is an ordinary problem response."
)
_UNBUFFERED = {"X-Accel-Buffering": "no"}
"""Tells nginx to forward each event at once."""

Delta = tuple[str, str]


async def stream(request: Request, episode_id: str, act_request: ActRequest) -> Response:
    """Starts the act and returns the response once the first event is known. Raises if the act fails before that."""
    deltas: asyncio.Queue[Delta | None] = asyncio.Queue()

    def emit(kind: str, delta: str) -> None:
        deltas.put_nowait((kind, delta))

    acting = asyncio.create_task(_act(request, episode_id, replace(act_request, sink=TextSink(emit))))
    acting.add_done_callback(lambda _: deltas.put_nowait(None))
    try:
        async with while_connected(request):
            first = await deltas.get()
    except (ClientClosed, asyncio.CancelledError):
        await _cancel(acting)
        raise
    if first is None:
        acting.result()  # raises if the act failed
    return StreamingResponse(
        _events(request, first, deltas, acting), media_type="text/event-stream", headers=_UNBUFFERED
    )


async def _act(request: Request, episode_id: str, act_request: ActRequest) -> Answer:
    with services(request).admission.admitted(caller(request).tenant):
        return await services(request).sessions.act(episode_id, act_request)


async def _events(
    request: Request, item: Delta | None, deltas: "asyncio.Queue[Delta | None]", acting: "asyncio.Task[Answer]"
) -> AsyncGenerator[bytes]:
    """Yields the events of an act. Cancels the act if the client disconnects."""
    kinds: set[str] = set()
    try:
        while item is not None:
            kinds.add(item[0])
            yield _event(item[0], {"delta": item[1]})
            item = await deltas.get()
        answer = acting.result()
        for kind in ("reasoning", "text"):  # not streamed: a retry, or a discrete action
            if answer[kind] and kind not in kinds:
                yield _event(kind, {"delta": answer[kind]})
        yield _event("act", answer)
    except Exception as error:  # noqa: BLE001 - the status was sent already
        yield _event("error", problems.document(request, problems.expected(error)))
    finally:
        await _cancel(acting)


def _event(kind: str, data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), strict_json.write(data, default=str))


async def _cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
