"""Retries: when a call is sent again, and after how long a delay.

Most calls are idempotent, because the client chooses the episode's id and the step index. Other calls are retried only
if no connection was made or if the service reported that it did nothing.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import httpx

Outcome = httpx.Response | httpx.RequestError
"""The result of one attempt: a response with any status, or an error of the connection."""

_RETRIED_STATUS = frozenset({429, 502, 503})
_RETRIED_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)
_REFUSED_STATUS = frozenset({429, 503})
_NEVER_ARRIVED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how long a client retries.

    A call is retried at most `max_retries` times, and never later than `total_s` seconds after its first attempt began.
    The delay is the service's Retry-After (RFC 9110, 10.2.3) plus a random part of a backoff that doubles from
    `first_s` to `max_s` seconds ("full jitter": Marc Brooker, "Exponential Backoff And Jitter", AWS, 2015).
    """

    max_retries: int = 10
    total_s: float = 60.0
    first_s: float = 0.1
    max_s: float = 5.0

    def backoff_s(self, num_retries: int) -> float:
        """The maximum delay in seconds, without Retry-After, before retry number `num_retries`, counted from 0."""
        return min(self.max_s, self.first_s * 2.0 ** min(num_retries, 60))


class Attempts:
    """Counts the attempts of one call. The time limit starts when this object is created."""

    def __init__(self, retry: Retry, *, repeatable: bool = True) -> None:
        self._retry = retry
        self._status, self._errors = (
            (_RETRIED_STATUS, _RETRIED_ERRORS) if repeatable else (_REFUSED_STATUS, _NEVER_ARRIVED)
        )
        self._num_retries = 0
        self._give_up_at = time.monotonic() + retry.total_s

    def wait_s(self, outcome: Outcome) -> float | None:
        """Seconds to wait before the next attempt, or None if `outcome` is final."""
        if isinstance(outcome, httpx.Response):
            header = outcome.headers.get("Retry-After", "")
            after_s = float(header) if header.isascii() and header.isdigit() else 0.0
            return self.backoff_s(after_s) if outcome.status_code in self._status else None
        return self.backoff_s() if isinstance(outcome, self._errors) else None

    def backoff_s(self, after_s: float = 0.0) -> float | None:
        """Seconds to wait before the next attempt, at least `after_s`. None if no retry or no time is left."""
        if self._num_retries >= self._retry.max_retries:
            return None
        wait_s = after_s + random.uniform(0.0, self._retry.backoff_s(self._num_retries))  # noqa: S311 - jitter
        self._num_retries += 1
        return wait_s if time.monotonic() + wait_s < self._give_up_at else None
