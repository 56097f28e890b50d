"""The errors that a caller can receive: their HTTP status, stable code, and further fields.

EpisodicError
├── BadRequest           400 malformed_json
├── MalformedRequest     400 malformed_request
├── Unauthenticated      401 unauthenticated
├── Forbidden            403 forbidden
├── NotFound             404 episode_not_found, policy_not_found, not_found
├── Conflict             409 step_conflict, idempotency_mismatch, episode_busy, episode_ended, context_overflow,
│                            policy_in_use, no_previous_version
├── Gone                 410 episode_deleted
├── TooLarge             413 payload_too_large
├── Unprocessable        422 invalid_request
├── HeadersTooLarge      431 headers_too_large
├── TooManyRequests      429 rate_limited, quota_exceeded, overloaded (with Retry-After)
├── PolicyFailed         500 policy_failed
├── Unavailable          503 engine_unavailable, store_unavailable, draining (with Retry-After)
└── DeadlineExceeded     504 deadline_exceeded
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar


class EpisodicError(Exception):
    """An expected failure, which the caller receives as a problem document.

    code: a stable snake_case name.
    detail: says what was wrong, where, and what to do.
    context: further fields of the problem document.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    headers: Mapping[str, str] = {}
    """Headers of the response."""

    def __init__(self, code: str, detail: str, **context: Any) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.context: Mapping[str, Any] = context


class BadRequest(EpisodicError):
    """The body is not JSON, or it did not arrive as a whole."""

    status = 400
    title = "Malformed request body"


class MalformedRequest(EpisodicError):
    """The request is not HTTP/1.1."""

    status = 400
    title = "Malformed request"


class Unauthenticated(EpisodicError):
    status = 401
    title = "Unauthenticated"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class Forbidden(EpisodicError):
    status = 403
    title = "Forbidden"


class NotFound(EpisodicError):
    status = 404
    title = "Not found"


class Conflict(EpisodicError):
    status = 409
    title = "Conflict"


class Gone(EpisodicError):
    status = 410
    title = "Gone"


class TooLarge(EpisodicError):
    status = 413
    title = "Payload too large"


class Unprocessable(EpisodicError):
    """The request is invalid. `errors` lists the location (`loc`, a path of keys) and message (`msg`) of each fault."""

    status = 422
    title = "Invalid request"

    def __init__(self, detail: str, *loc: str | int, errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__("invalid_request", detail, errors=errors or [{"loc": list(loc), "msg": detail}])


class HeadersTooLarge(EpisodicError):
    status = 431
    title = "Request header fields too large"


class PolicyFailed(EpisodicError):
    """The model computed probabilities that are not numbers. A retry would fail, too."""

    status = 500
    title = "Policy failed"

    def __init__(self) -> None:
        detail = (
            "The policy computed a probability that is not a number (NaN). Nothing was stored. "
            "Its weights are damaged, or its numbers exceed the range of the engine option dtype. "
            "Use another policy or dtype."
        )
        super().__init__("policy_failed", detail)


class _RetryLater(EpisodicError):
    """The caller should retry after `retry_after_s` seconds, which are sent as Retry-After, rounded up."""

    def __init__(self, code: str, detail: str, *, retry_after_s: float = 1, **context: Any) -> None:
        super().__init__(code, detail, **context)
        self.headers = {"Retry-After": str(max(math.ceil(retry_after_s), 1))}


class TooManyRequests(_RetryLater):
    status = 429
    title = "Too many requests"


class Unavailable(_RetryLater):
    status = 503
    title = "Unavailable"


class DeadlineExceeded(EpisodicError):
    status = 504
    title = "Deadline exceeded"


def episode_not_found(episode_id: str) -> NotFound:
    return NotFound("episode_not_found", f"There is no episode {episode_id!r}. Check the id and the API key's tenant.")


def episode_deleted(episode_id: str) -> Gone:
    return Gone("episode_deleted", f"Episode {episode_id!r} was deleted. Use another id.")
