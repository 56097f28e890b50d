"""Owns the OpenAPI document's request bodies, which FastAPI cannot know: `body.read` reads them, not FastAPI."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

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
    "description": "Makes a retry safe, as `step` does.",
}
_REFERENCE = "#/components/schemas/{model}"


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON body of this model, as `openapi_extra` takes it."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"required": True, "content": {"application/json": {"schema": reference}}}


def install(app: FastAPI) -> None:
    """Adds the request models, and those that they are made of, to the document's components."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for model in _REQUESTS:
            schema = model.model_json_schema(ref_template=_REFERENCE)
            parts = schema.pop("$defs", {})
            document["components"]["schemas"].update({**parts, model.__name__: schema})
        return document

    app.openapi = openapi
