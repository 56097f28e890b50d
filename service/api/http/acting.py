"""What surrounds an act of a caller's: its admission, and its end when the caller disconnects."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request

from service.api.http.caller import caller
from service.api.http.services import services


class ClientClosed(Exception):
    """The caller disconnected before the answer. Nobody receives it; the log shows status 499."""


@asynccontextmanager
async def acting(request: Request, num_acts: int = 1) -> AsyncGenerator[None]:
    """Counts acts of the caller's while they run, and cancels them when the caller disconnects. Raises TooManyRequests,
    ClientClosed."""
    async with while_connected(request):
        with services(request).admission.admitted(caller(request).tenant, num_acts):
            yield


@asynccontextmanager
async def while_connected(request: Request) -> AsyncGenerator[None]:
    """Cancels what runs inside when the caller disconnects, and raises ClientClosed then.

    The body must have been read: the next message is http.disconnect.
    """
    inside = asyncio.current_task()
    assert inside is not None
    is_inside = True

    def leave(task: "asyncio.Future[Any]") -> None:
        if is_inside and not task.cancelled():
            inside.cancel()

    watching = asyncio.ensure_future(request.receive())
    watching.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError as error:
        if not watching.done():
            raise
        inside.uncancel()
        raise ClientClosed from error
    finally:
        is_inside = False  # the answer may be complete as the caller disconnects
        watching.cancel()
