"""JSON responses."""

from collections.abc import Mapping

import orjson
from starlette.responses import Response


def json_answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a JSON response. Values that orjson does not know are written as str."""
    return Response(orjson.dumps(document, default=str), status, headers, media_type="application/json")
