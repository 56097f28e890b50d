"""Adds the request bodies to the OpenAPI document. FastAPI does not know them, because `body.read` parses them."""

from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from service.api.http.body import is_optional
from service.api.http.schemas import (
    ActRequest,
    AdapterRequest,
    BatchRequest,
    DefaultPolicyRequest,
    EndRequest,
    EpisodeRequest,
    FeedbackRequest,
    ForkRequest,
    RecordRequest,
)
from service.validation import strict_json

VERSION = version("episodic")

_REQUESTS = (
    ActRequest,
    AdapterRequest,
    BatchRequest,
    DefaultPolicyRequest,
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
RATING_KEY = {
    **IDEMPOTENCY_KEY,
    "description": "Makes retries safe: a request with the same key and body returns the stored rating and adds none. "
    "The same key with another body is refused (409 `idempotency_mismatch`).",
}
_REFERENCE = "#/components/schemas/{model}"


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns OpenAPI's `requestBody` for a JSON body of this model, for FastAPI's `openapi_extra`."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"required": not is_optional(model), "content": {"application/json": {"schema": reference}}}


def install(app: FastAPI) -> None:
    """Adds the request models, and the models nested in them, to the components of the app's OpenAPI document."""
    generate = app.openapi

    @cache
    def openapi() -> dict[str, Any]:
        document = generate()
        schemas: dict[str, Any] = document["components"]["schemas"]
        for model in _REQUESTS:
            schema = model.model_json_schema(ref_template=_REFERENCE)
            parts = schema.pop("$defs", {})
            schemas.update({**parts, model.__name__: schema})
        # The service validates each act of a batch by itself, so the model has no reference to it.
        schemas["BatchRequest"]["properties"]["acts"]["items"] = {"$ref": _REFERENCE.format(model="ActRequest")}
        return document

    app.openapi = openapi


@lru_cache(1)
def as_json(app: FastAPI) -> bytes:
    """Returns the OpenAPI document of the app. It is made at the first call, because that takes long."""
    return strict_json.write(app.openapi())
