"""Admits acts, and cancels them when the caller disconnects."""

import asyncio
from contextlib import AbstractContextManager
from typing import Any

from starlette.requests import Request

from service.api.http.caller import caller
from service.api.http.services import services

WATCH_AFTER_S = 0.1
"""Seconds after which a disconnect is noticed."""


class ClientClosed(Exception):
    """The caller disconnected before the response. Nobody receives this error; the log shows status 499."""


def admitted(request: Request) -> AbstractContextManager[None]:
    """Admits the caller's act and counts it while the block runs. Raises Unavailable (draining), TooManyRequests."""
    services(request).sessions.refuse_acts_while_draining()
    return services(request).admission.admitted(caller(request).tenant)


class WhileConnected:
    """Cancels the block when the caller disconnects, and raises ClientClosed.

    Read the whole body before: the next ASGI message must be http.disconnect. It is awaited only after WATCH_AFTER_S,
    because the task for it costs as much as a good part of a short act.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._watching: asyncio.Future[Any] | None = None
        self._is_running = True

    async def __aenter__(self) -> None:
        block = asyncio.current_task()
        assert block is not None
        self._block = block
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._watch)

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._is_running = False  # a disconnect after the block must not cancel the task any more
        self._timer.cancel()
        if self._watching is None:
            return
        if isinstance(error, asyncio.CancelledError) and self._watching.done():
            self._block.uncancel()
            raise ClientClosed from error
        self._watching.cancel()

    def _watch(self) -> None:
        self._watching = asyncio.ensure_future(self._request.receive())
        self._watching.add_done_callback(self._cancel_block)

    def _cancel_block(self, watching: "asyncio.Future[Any]") -> None:
        if self._is_running and not watching.cancelled():
            self._block.cancel()
