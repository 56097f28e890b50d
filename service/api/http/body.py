"""Reads request bodies: size and time limits, strict JSON, validation, and the digest that identifies a retry."""

import asyncio
import hashlib
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from service.api.http.services import services
from service.errors import BadRequest, TooLarge, Unprocessable
from service.validation import strict_json

Model = TypeVar("Model", bound=BaseModel)

# A retry may change its timeout. The id and the step of a retry are compared on their own.
_NOT_DIGESTED = ("episode_id", "step", "timeout_s")


async def read(request: Request, model: type[Model]) -> tuple[Model, bytes]:
    """Reads the body. Returns it as a `model`, and its 16-byte digest. Raises BadRequest, TooLarge, Unprocessable.

    An empty body is an empty object, if every field of the model is optional.
    """
    document = await read_document(request, may_be_empty=is_optional(model))
    return validated(document, model), digest(document)


@cache
def is_optional(model: type[BaseModel]) -> bool:
    """Returns whether every field of the model is optional, so that the body may be empty."""
    return not any(field.is_required() for field in model.model_fields.values())


async def read_document(request: Request, *, may_be_empty: bool = False, unchecked: str = "") -> dict[str, Any]:
    """Reads the body as a JSON object that can be stored. Raises BadRequest, TooLarge, Unprocessable.

    unchecked: a field that the caller passes to `check` by itself.
    """
    content = await read_bytes(request)
    if may_be_empty and not content:
        return {}
    parsed = _parse(content)
    if not isinstance(parsed, dict):
        raise Unprocessable("The request body is not a JSON object. Send an object of named fields: {...}.")
    document = cast("dict[str, Any]", parsed)
    check({name: value for name, value in document.items() if name != unchecked})
    return document


def check(document: dict[str, Any]) -> None:
    """Raises BadRequest or Unprocessable if a part of the document cannot be stored. An error could not quote it,
    either, so this comes before all other checks."""
    _canonical(document)


def validated(document: dict[str, Any], model: type[Model]) -> Model:
    """Validates the document as a `model`. Raises Unprocessable with the location of each error (at most 20)."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        errors = [
            {"loc": [part for part in item["loc"] if part != "__root__"], "msg": _message(dict(item), model)}
            for item in error.errors(include_url=False, include_context=False, include_input=False)[:20]
        ]
        raise Unprocessable(f"{_dotted(errors[0]['loc'])}: {errors[0]['msg']}", errors=errors) from error


def _message(error: dict[str, Any], model: type[BaseModel]) -> str:
    if error["type"] != "extra_forbidden":
        return error["msg"]
    *parents, name = error["loc"]
    names = _fields(model)[bool(parents)]
    if near := get_close_matches(str(name), names, n=1):
        return f"unknown field. Did you mean {near[0]!r}?"
    return "unknown field. Check it for typos." if parents else f"unknown field. The fields are {', '.join(names)}."


@cache
def _fields(model: type[BaseModel]) -> tuple[list[str], list[str]]:
    """The names of the model's fields, and those of the fields of its parts."""
    schema = model.model_json_schema()
    parts = {name for part in schema.get("$defs", {}).values() for name in part.get("properties", ())}
    return list(schema["properties"]), sorted(parts)


async def read_bytes(request: Request) -> bytes:
    """Reads the raw body. Raises TooLarge, and BadRequest if the body is compressed, incomplete or too slow."""
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        detail = "Content-Encoding: compressed request bodies are not supported. Send the body uncompressed."
        raise BadRequest("malformed_json", detail)
    settings = services(request).settings
    limit, limit_s = settings.max_body_bytes, settings.receive_limit_s
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_large(limit)
    try:
        if request.scope.get("is_complete"):
            return await _received(request, limit)
        async with asyncio.timeout(limit_s):
            return await _received(request, limit)
    except ClientDisconnect as error:
        raise BadRequest("malformed_json", "The connection closed before the whole body arrived. Retry.") from error
    except TimeoutError as error:
        detail = (
            f"The request body did not arrive within {limit_s:g} s (EPISODIC_RECEIVE_LIMIT_S). "
            "Send it faster, or send a smaller one."
        )
        raise BadRequest("malformed_json", detail) from error


async def _received(request: Request, limit: int) -> bytes:
    body, is_last = bytearray(), False
    while not is_last:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        is_last = not message.get("more_body", False)
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> TooLarge:
    detail = f"The request body is larger than {limit} bytes (EPISODIC_MAX_BODY_BYTES). Send a smaller one."
    return TooLarge("payload_too_large", detail, max_body_bytes=limit)


def checked_json(content: bytes) -> Any:
    """Parses JSON. Raises BadRequest if it is not strict, nests too deeply or has an integer of more than 64 bits."""
    try:
        value = strict_json.parse(content, object_pairs_hook=strict_json.without_twins)
        strict_json.dump(value, max_bits=64)
    except ValueError as error:
        raise _malformed(content, error) from error
    return value


def _parse(body: bytes) -> Any:
    try:
        return strict_json.parse_unchecked(body, object_pairs_hook=strict_json.without_twins)
    except ValueError as error:
        raise _malformed(body, error) from error


def _malformed(content: bytes, error: ValueError) -> BadRequest:
    if content:
        return BadRequest("malformed_json", f"The request body is not valid JSON: {error}.")
    return BadRequest("malformed_json", "The request body is empty. Send a JSON object of named fields: {...}.")


def digest(document: dict[str, Any]) -> bytes:
    """Returns the 16-byte digest of a request body. A retry has the same digest; another call has another one.

    Raises BadRequest or Unprocessable for a value that cannot be stored.
    """
    content = {key: value for key, value in document.items() if key not in _NOT_DIGESTED}
    return hashlib.blake2b(_canonical(content), digest_size=16).digest()


def idempotency_key(request: Request) -> str | None:
    """Returns the Idempotency-Key header, or None. Raises Unprocessable if its length is wrong."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        detail = f"Header Idempotency-Key: must have 1 to 255 characters, not {len(key)}."
        raise Unprocessable(detail, "Idempotency-Key")
    return key


def _canonical(value: Any) -> bytes:
    try:
        return strict_json.dump(value, sort_keys=True)
    except strict_json.TooDeep as error:
        raise BadRequest("malformed_json", f"The request body {error}. Nest it less.") from error
    except strict_json.Unstorable as error:
        raise _unstorable(error) from error


def _unstorable(error: strict_json.Unstorable) -> Unprocessable:
    return Unprocessable(f"{_dotted(error.place)}: {error}.", *error.place)


def _dotted(place: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in place) or "body"
