"""JSON responses."""

from collections.abc import Mapping

from starlette.responses import Response

from service.validation import strict_json


def json_answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a JSON response. Values that are not JSON are written as str."""
    return Response(strict_json.write(document, default=str), status, headers, media_type="application/json")
