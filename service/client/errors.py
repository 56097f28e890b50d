"""The errors of the client.

* EpisodicError
  x ConnectionFailed        no complete response: connection refused, lost or timed out, also after the retries
  x InvalidResponse         the response does not follow the API
  x ApiError                the service reported a problem (RFC 9457); see `code`
    + EpisodeNotFound       404
    + EpisodeDeleted        410
    + EpisodeEnded          409, has `stop_reason`
    + EpisodeBusy           409, another caller's act is in flight in this episode
    + IdempotencyMismatch   409, another caller has taken this step, or the episode's id is in use
    + StepConflict          409, has `expected_step`: the step is not the next one; call `refresh()`
    + ContextOverflow       409, the prompt no longer fits into the context
    + DeadlineExceeded      504, `timeout_s` expired and nothing was committed
    + Unavailable           429, 502 or 503, also after the retries
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import httpx


class EpisodicError(Exception):
    """The base class of all errors of calls."""


class ConnectionFailed(EpisodicError):
    """No complete response arrived, so the call may or may not have taken effect.

    Making the call again with the same arguments is safe, except for a rating without a rater, which gets a new
    idempotency key and would count twice.
    """


class InvalidResponse(EpisodicError):
    """The response does not follow the API, for example because a proxy sent it and not the service."""


class ApiError(EpisodicError):
    """A problem that the service reported.

    `status` is the HTTP status, `code` the stable name of the problem, and `detail` an explanation for people. Quote
    `request_id` to the operator of the service. `context` has the problem's further fields.
    """

    def __init__(self, status: int, code: str, detail: str, request_id: str | None, context: dict[str, Any]) -> None:
        super().__init__(f"{code} ({status}): {detail}" if detail else f"{code} ({status})")
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.context = context


class EpisodeNotFound(ApiError):
    """The episode does not exist, or it belongs to another tenant."""


class EpisodeDeleted(ApiError):
    """The episode was deleted."""


class EpisodeBusy(ApiError):
    """Another act is in flight in the episode. Act again when it has completed."""


class IdempotencyMismatch(ApiError):
    """The step was taken, or the episode id used, by a request with another body, usually that of another caller.

    `Episode.refresh()` moves on to the next step.
    """


class EpisodeEnded(ApiError):
    """The episode has ended and accepts no further act."""

    @property
    def stop_reason(self) -> str | None:
        return self.context.get("stop_reason")


class StepConflict(ApiError):
    """The act's step index is neither the next one nor that of a retry."""

    @property
    def expected_step(self) -> int | None:
        return self.context.get("expected_step")


class ContextOverflow(ApiError):
    """The prompt no longer fits into the context, and the episode was opened with overflow "error"."""


class DeadlineExceeded(ApiError):
    """`timeout_s` expired. Nothing was committed, so the same act can be sent again."""


class Unavailable(ApiError):
    """The service was overloaded, starting or draining at every attempt, retries included."""


_BY_CODE: dict[str, type[ApiError]] = {
    "episode_not_found": EpisodeNotFound,
    "episode_deleted": EpisodeDeleted,
    "episode_ended": EpisodeEnded,
    "episode_busy": EpisodeBusy,
    "idempotency_mismatch": IdempotencyMismatch,
    "step_conflict": StepConflict,
    "context_overflow": ContextOverflow,
    "deadline_exceeded": DeadlineExceeded,
}
_UNAVAILABLE_STATUS = frozenset({429, 502, 503})
_STANDARD_FIELDS = frozenset({"type", "title", "status", "code", "detail", "request_id"})


@contextmanager
def reading(what: str) -> Generator[None]:
    """Turns errors of parsing a response into InvalidResponse. `what` names the call."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidResponse(f"cannot parse the response to {what}: {error}") from error


def problem(response: httpx.Response) -> EpisodicError:
    """The error for a response that is not a success. A proxy may have sent it."""
    if response.status_code < 400:
        request = response.request
        return InvalidResponse(f"unexpected status {response.status_code} from {request.method} {request.url}")
    return problem_of(response.status_code, _fields(response), response.headers.get("X-Request-ID"))


def problem_of(status: int, fields: dict[str, Any], request_id: str | None) -> ApiError:
    """The error for the fields of a problem document."""
    code = str(fields.get("code") or fields.get("reason") or f"http_{status}")
    kind = _BY_CODE.get(code, Unavailable if status in _UNAVAILABLE_STATUS else ApiError)
    return kind(
        status,
        code,
        str(fields.get("detail") or ""),
        fields.get("request_id") or request_id,
        {name: value for name, value in fields.items() if name not in _STANDARD_FIELDS},
    )


def _fields(response: httpx.Response) -> dict[str, Any]:
    """The fields of the problem document; none if a proxy answered with something else."""
    try:
        fields = json.loads(response.content)
    except ValueError:
        return {}
    return cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}
