"""Owns the errors of the client.

* EpisodicError
  x ConnectionFailed        no answer came: refused, dropped or timed out, retries included
  x InvalidResponse         an answer came that the contract does not know
  x ApiError                the service answered with a problem (RFC 9457); look at `code`
    + EpisodeNotFound       404
    + EpisodeEnded          409, has `stop_reason`
    + StepConflict          409, has `expected_step`: someone else acts in this episode, `refresh()` it
    + ContextOverflow       409, the prompt no longer fits
    + DeadlineExceeded      504, `timeout_s` ran out and nothing was committed
    + Unavailable           429 or 503, still so after the retries
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import httpx


class EpisodicError(Exception):
    """The base of every error the client raises about a call."""


class ConnectionFailed(EpisodicError):
    """No answer came. The call may or may not have taken effect. Making it again with the same arguments is safe, but
    for a rating without a rater, which would count twice."""


class InvalidResponse(EpisodicError):
    """The answer does not follow the contract, for example because something other than the service sent it."""


class ApiError(EpisodicError):
    """A problem that the service reported.

    `status` is the HTTP status, `code` the stable name of the problem, `detail` a sentence for people,
    `request_id` what to quote to the operator, `context` the problem's further fields.
    """

    def __init__(self, status: int, code: str, detail: str, request_id: str | None, context: dict[str, Any]) -> None:
        super().__init__(f"{code} ({status}): {detail}" if detail else f"{code} ({status})")
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.context = context


class EpisodeNotFound(ApiError):
    """No such episode, or it belongs to another tenant."""


class EpisodeEnded(ApiError):
    """The episode has ended and takes no further act."""

    @property
    def stop_reason(self) -> str | None:
        return self.context.get("stop_reason")


class StepConflict(ApiError):
    """The step sent is neither the next one nor a replay."""

    @property
    def expected_step(self) -> int | None:
        return self.context.get("expected_step")


class ContextOverflow(ApiError):
    """The episode was made with overflow "error" and its prompt no longer fits."""


class DeadlineExceeded(ApiError):
    """`timeout_s` ran out. Nothing was committed: the same act may be tried again."""


class Unavailable(ApiError):
    """The service is overloaded, starting or draining, and stayed so through the retries."""


_BY_CODE: dict[str, type[ApiError]] = {
    "episode_not_found": EpisodeNotFound,
    "episode_ended": EpisodeEnded,
    "step_conflict": StepConflict,
    "context_overflow": ContextOverflow,
    "deadline_exceeded": DeadlineExceeded,
}
_UNAVAILABLE_STATUS = frozenset({429, 502, 503})
_STANDARD_FIELDS = frozenset({"type", "title", "status", "code", "detail", "request_id"})


@contextmanager
def reading(what: str) -> Generator[None]:
    """Raises InvalidResponse for an answer that is not what `what` should give."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InvalidResponse(f"{what}: {error}") from error


def problem(response: httpx.Response) -> EpisodicError:
    """The error that a response without success stands for, whoever sent it."""
    if response.status_code < 400:
        request = response.request
        return InvalidResponse(f"{request.method} {request.url}: status {response.status_code} is no answer of its")
    return problem_of(response.status_code, _fields(response), response.headers.get("X-Request-ID"))


def problem_of(status: int, fields: dict[str, Any], request_id: str | None) -> ApiError:
    """The error that a problem document stands for."""
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
    """A proxy in between answers in its own words: then there are no fields."""
    try:
        fields = json.loads(response.content)
    except ValueError:
        return {}
    return cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}
