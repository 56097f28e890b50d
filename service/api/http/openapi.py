"""Adds the request bodies to the OpenAPI document. FastAPI does not know them, because `body.read` parses them."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from service.api.http.body import is_optional
from service.api.http.schemas import (
    ActRequest,
    AdapterRequest,
    BatchRequest,
    EndRequest,
    EpisodeRequest,
    FeedbackRequest,
    ForkRequest,
    RecordRequest,
)

_REQUESTS = (
    ActRequest,
    AdapterRequest,
    BatchRequest,
    EndRequest,
    EpisodeRequest,
    FeedbackRequest,
    ForkRequest,
    RecordRequest,
)
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "Makes retries safe: a request with the same key and body returns the stored step and takes no new "
    "one. The same key with another body is refused (409 `idempotency_mismatch`). `step` has the same effect.",
}
_REFERENCE = "#/components/schemas/{model}"


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns OpenAPI's `requestBody` for a JSON body of this model, for FastAPI's `openapi_extra`."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"required": not is_optional(model), "content": {"application/json": {"schema": reference}}}


def install(app: FastAPI) -> None:
    """Adds the request models, and the models nested in them, to the components of the app's OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for model in _REQUESTS:
            schema = model.model_json_schema(ref_template=_REFERENCE)
            parts = schema.pop("$defs", {})
            document["components"]["schemas"].update({**parts, model.__name__: schema})
        return document

    app.openapi = openapi
