"""Errors of the service on /v1 and its kin, in OpenAI's shape: that is what clients of these routes parse."""

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.errors import EpisodicError

ROOTS = ("tokenize", "detokenize", "pooling", "classify", "score", "rerank")
"""Paths beside /v1 that the engine's own app serves."""


def owns(path: str) -> bool:
    """Whether the path is served by the engine's own app."""
    return path.startswith("/v1/") or path.removeprefix("/") in ROOTS


def refusal(_: Request, error: EpisodicError) -> Response:
    return openai_error(error.status, error.detail, error.code, dict(error.headers))


def openai_error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    document = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(orjson.dumps(document), status, headers, media_type="application/json")
