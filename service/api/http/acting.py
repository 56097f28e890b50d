"""Admits acts, and cancels them when the caller disconnects."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.requests import Request

from service.api.http.caller import caller
from service.api.http.services import services


class ClientClosed(Exception):
    """The caller disconnected before the response. Nobody receives this error; the log shows status 499."""


@asynccontextmanager
async def acting(request: Request) -> AsyncGenerator[None]:
    """Admits the caller's act and counts it while the block runs. Cancels the block when the caller disconnects.

    Raises Unavailable (draining), TooManyRequests, and ClientClosed if the caller disconnected.
    """
    async with while_connected(request):
        with admitted(request):
            yield


@contextmanager
def admitted(request: Request) -> Generator[None]:
    """Admits the caller's act and counts it while the block runs. Raises Unavailable (draining), TooManyRequests."""
    services(request).sessions.refuse_acts_while_draining()
    with services(request).admission.admitted(caller(request).tenant):
        yield


@asynccontextmanager
async def while_connected(request: Request) -> AsyncGenerator[None]:
    """Cancels the block when the caller disconnects, and raises ClientClosed.

    Read the whole body before: the next ASGI message must be http.disconnect.
    """
    block = asyncio.current_task()
    assert block is not None
    is_running = True

    def cancel_block(task: "asyncio.Future[Any]") -> None:
        if is_running and not task.cancelled():
            block.cancel()

    watching = asyncio.ensure_future(request.receive())
    watching.add_done_callback(cancel_block)
    try:
        yield
    except asyncio.CancelledError as error:
        if not watching.done():
            raise
        block.uncancel()
        raise ClientClosed from error
    finally:
        is_running = False  # a disconnect after the block must not cancel the task any more
        watching.cancel()
