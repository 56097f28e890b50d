"""Errors of the OpenAI-compatible routes, in the format that OpenAI clients parse."""

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.errors import EpisodicError

ROOTS = ("tokenize", "detokenize", "pooling", "classify", "score", "rerank")
"""Paths outside /v1 that the engine's own app serves."""


def owns(path: str) -> bool:
    """Returns whether the engine's own app serves this path."""
    return path.startswith("/v1/") or path.removeprefix("/") in ROOTS


def refusal(_: Request, error: EpisodicError) -> Response:
    """Returns the error as a response in OpenAI's format."""
    return openai_error(error.status, error.detail, error.code, dict(error.headers))


def openai_error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    """Returns a response in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    document = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(orjson.dumps(document), status, headers, media_type="application/json")
