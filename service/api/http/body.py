"""Owns the reading of a request body: its limit, strict JSON, and the digest that tells a retry from another call."""

import asyncio
import hashlib
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from service.api.http.services import services
from service.errors import BadRequest, TooLarge, Unprocessable
from service.validation import strict_json

Model = TypeVar("Model", bound=BaseModel)

# What says how to send a call, not what it says.
_NOT_DIGESTED = ("episode_id", "step", "timeout_s")


async def read(request: Request, model: type[Model]) -> tuple[Model, bytes]:
    """The body as `model`, and its 16-byte digest. Raises BadRequest, TooLarge, Unprocessable."""
    document = await read_document(request)
    identity = digest(document)  # first: what cannot be kept is malformed, whatever else it is
    return validated(document, model), identity


async def read_document(request: Request) -> dict[str, Any]:
    """The body, a JSON object. Raises BadRequest, TooLarge, Unprocessable."""
    parsed = _parse(await read_bytes(request))
    if not isinstance(parsed, dict):
        raise Unprocessable("the body must be a JSON object")
    return cast("dict[str, Any]", parsed)


def validated(document: dict[str, Any], model: type[Model]) -> Model:
    """Raises Unprocessable, which says where the document is wrong."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        errors = [
            {"loc": [part for part in item["loc"] if part != "__root__"], "msg": item["msg"]}
            for item in error.errors(include_url=False, include_context=False, include_input=False)[:20]
        ]
        where = ".".join(str(part) for part in errors[0]["loc"])
        raise Unprocessable(f"{where or 'body'}: {errors[0]['msg']}", errors=errors) from error


async def read_bytes(request: Request) -> bytes:
    """The body as it was sent. Raises TooLarge, and BadRequest for one that is compressed, ends early, or takes more
    seconds than a request may."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequest("malformed_json", "The body is compressed (Content-Encoding); send it as it is.")
    settings = services(request).settings
    limit, limit_s = settings.max_body_bytes, settings.receive_limit_s
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except ClientDisconnect as error:
        raise BadRequest("malformed_json", "The body ended early.") from error
    except TimeoutError as error:
        raise BadRequest("malformed_json", f"The body did not arrive within {limit_s:g} s.") from error
    return bytes(body)


def _too_large(limit: int) -> TooLarge:
    return TooLarge("payload_too_large", f"A body may have at most {limit} bytes.", max_body_bytes=limit)


def check_json(content: bytes) -> None:
    """Raises BadRequest for JSON that is not strict, nests too deeply or holds too large a number."""
    _canonical(_parse(content))


def _parse(body: bytes) -> Any:
    try:
        return strict_json.parse(body, object_pairs_hook=strict_json.without_twins)
    except ValueError as error:
        raise BadRequest("malformed_json", f"The body is not JSON: {error}") from error


def digest(document: dict[str, Any]) -> bytes:
    """Tells a retry from another call, 16 bytes. Raises BadRequest for what cannot be kept."""
    said = {key: value for key, value in document.items() if key not in _NOT_DIGESTED}
    return hashlib.blake2b(_canonical(said), digest_size=16).digest()


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key header. Raises Unprocessable."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        raise Unprocessable("Idempotency-Key must have 1 to 255 characters", "Idempotency-Key")
    return key


def _canonical(value: Any) -> bytes:
    try:
        return strict_json.dump(value, sort_keys=True)
    except ValueError as error:
        raise BadRequest("malformed_json", f"The body cannot be kept: {error}") from error
