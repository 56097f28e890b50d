"""JSON responses."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.validation import strict_json


class JSONAnswer(Response):
    """A JSON response. It makes its two headers faster than Starlette's classes.

    `is_whole` says that the body follows at once, so that the server sends head and body together.
    """

    media_type = "application/json"

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        if headers is None:
            length = str(len(self.body)).encode()
            self.raw_headers = [(b"content-length", length), (b"content-type", b"application/json")]
        else:
            super().init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send({**start, "is_whole": True})
        await send({"type": "http.response.body", "body": self.body})


def json_answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a JSON response. Values that are not JSON are written as str."""
    return _answer(strict_json.write(document, default=str), status, headers)


async def long_answer(document: Callable[[], dict[str, Any]], status: int = 200) -> Response:
    """Returns a JSON response that may be large. A thread makes and serializes the document, so that acts go on."""
    return _answer(await serialized(document), status)


async def serialized(document: Callable[[], dict[str, Any]]) -> bytes:
    """Makes the document in a thread, and returns it as JSON."""
    return await asyncio.to_thread(lambda: _dump(document()))


def _dump(document: dict[str, Any]) -> bytes:
    """Serializes each item of the document's lists by itself: orjson holds the interpreter's lock until it returns."""
    return b"{%b}" % b",".join(strict_json.write(name) + b":" + _value(value) for name, value in document.items())


def _value(value: object) -> bytes:
    if not isinstance(value, list):
        return strict_json.write(value, default=str)
    return b"[%b]" % b",".join(strict_json.write(item, default=str) for item in cast("list[object]", value))


def _answer(body: bytes, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return JSONAnswer(body, status, headers)
