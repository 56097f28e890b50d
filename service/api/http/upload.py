"""Writes the body of an upload to a file, without keeping it in memory."""

import asyncio
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from service.api.http.services import services
from service.errors import BadRequest, TooLarge

_CHUNK = 1 << 20


async def save(request: Request, target: Path) -> None:
    """Writes the body to a new file.

    Raises TooLarge, and BadRequest if the body is compressed, incomplete, or does not arrive for a while.
    """
    settings = services(request).settings
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise BadRequest("malformed_json", "Content-Encoding: compressed uploads are not supported. Send a plain tar.")
    if int(request.headers.get("content-length", 0)) > settings.max_adapter_bytes:
        raise _too_large(settings.max_adapter_bytes)
    try:
        await _receive(request, target, settings.max_adapter_bytes, settings.receive_limit_s)
    except ClientDisconnect as error:
        raise BadRequest("malformed_json", "The connection closed before the whole upload arrived. Retry.") from error
    except TimeoutError as error:
        detail = f"No part of the upload arrived for {settings.receive_limit_s:g} s (EPISODIC_RECEIVE_LIMIT_S). Retry."
        raise BadRequest("malformed_json", detail) from error


async def _receive(request: Request, target: Path, limit: int, limit_s: float) -> None:
    num_bytes, waiting, is_last = 0, bytearray(), False
    with target.open("xb") as file:
        while not is_last:
            async with asyncio.timeout(limit_s):
                message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part: bytes = message.get("body", b"")
            is_last, num_bytes = not message.get("more_body", False), num_bytes + len(part)
            if num_bytes > limit:
                raise _too_large(limit)
            waiting += part
            if is_last or len(waiting) >= _CHUNK:
                await asyncio.to_thread(file.write, bytes(waiting))
                waiting.clear()


def _too_large(limit: int) -> TooLarge:
    detail = f"The upload is larger than {limit} bytes (EPISODIC_MAX_ADAPTER_BYTES). Send a smaller adapter."
    return TooLarge("payload_too_large", detail, max_body_bytes=limit)
