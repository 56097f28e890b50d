"""Retries: when a call is sent again, and after how long a delay.

Most calls are idempotent, because the client chooses the episode's id and the step index. Other calls are retried only
if no connection was made or if the service reported that it did nothing.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass

import httpx

Outcome = httpx.Response | httpx.RequestError
"""The result of one attempt: a response with any status, or an error of the connection."""

_log = logging.getLogger("episodic")

_RETRIED_STATUS = frozenset({429, 502, 503})
_REFUSED_STATUS = frozenset({429, 503})
_NEVER_ARRIVED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_LOST = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how long a client retries.

    While the service is down, loading or overloaded (no connection, or status 429, 502 or 503), a call is retried for
    `total_s` seconds from its first failure, however often. A request that was sent and whose response was lost is
    retried at most `max_retries` times within this time.

    The delay is the service's Retry-After (RFC 9110, 10.2.3) plus a random part of a backoff that doubles from
    `first_s` to `max_s` seconds ("full jitter": Marc Brooker, "Exponential Backoff And Jitter", AWS, 2015).

    With `fail_fast`, a call fails at once if no connection can be made and the client has never received a response:
    the URL is probably wrong.
    """

    max_retries: int = 10
    total_s: float = 300.0
    first_s: float = 0.1
    max_s: float = 5.0
    fail_fast: bool = True

    def backoff_s(self, num_retries: int) -> float:
        """The maximum delay in seconds, without Retry-After, before retry number `num_retries`, counted from 0."""
        return min(self.max_s, self.first_s * 2.0 ** min(num_retries, 60))


class Link:
    """Whether the service at one URL has been reached. All calls of a client share it."""

    def __init__(self, url: str = "the service") -> None:
        self.was_reached = False
        self._url = url
        self._is_reported = False

    def record(self, outcome: Outcome) -> None:
        """Records the outcome of an attempt."""
        if isinstance(outcome, httpx.Response):
            self.was_reached = True
            if outcome.status_code not in _RETRIED_STATUS:
                self._is_reported = False

    def report(self, outcome: Outcome, total_s: float) -> None:
        """Logs a warning at the first retry since the service was last available. An overload (429) is not reported."""
        if self._is_reported or (isinstance(outcome, httpx.Response) and outcome.status_code == 429):
            return
        self._is_reported = True
        if isinstance(outcome, httpx.Response):
            why = f"{self._url} is not available (status {outcome.status_code})"
        else:
            why = f"no answer from {self._url} ({str(outcome) or type(outcome).__name__})"
        _log.warning("%s; retrying for up to %g s", why, total_s)


class Attempts:
    """Counts the attempts of one call. The time limit starts when the first of them has failed."""

    def __init__(self, retry: Retry, *, repeatable: bool = True, link: Link | None = None) -> None:
        self._retry = retry
        self._repeatable = repeatable
        self._link = link or Link()
        self._num_retries = 0
        self._num_lost = 0
        self._give_up_at: float | None = None

    def wait_s(self, outcome: Outcome) -> float | None:
        """Seconds to wait before the next attempt, or None if `outcome` is final."""
        self._link.record(outcome)
        wait_s = self._wait_s(outcome)
        if wait_s is not None:
            self._link.report(outcome, self._retry.total_s)
        return wait_s

    def wait_after_event_s(self, status: int) -> float | None:
        """Seconds to wait before the next attempt after a stream whose first event was an error with this status."""
        return self.backoff_s() if self._repeatable and status in _RETRIED_STATUS else None

    def _wait_s(self, outcome: Outcome) -> float | None:
        if isinstance(outcome, httpx.Response):
            header = outcome.headers.get("Retry-After", "")
            after_s = float(header) if header.isascii() and header.isdigit() else 0.0
            if _is_lost(outcome):
                return self._after_loss()
            status = _RETRIED_STATUS if self._repeatable else _REFUSED_STATUS
            return self.backoff_s(after_s) if outcome.status_code in status else None
        if isinstance(outcome, _NEVER_ARRIVED):
            return self.backoff_s() if self._link.was_reached or not self._retry.fail_fast else None
        return self._after_loss() if isinstance(outcome, _LOST) else None

    def _after_loss(self) -> float | None:
        if not self._repeatable or self._num_lost >= self._retry.max_retries:
            return None
        self._num_lost += 1
        return self.backoff_s()

    def backoff_s(self, after_s: float = 0.0) -> float | None:
        """Seconds to wait before the next attempt, at least `after_s`. None if no time is left."""
        wait_s = after_s + random.uniform(0.0, self._retry.backoff_s(self._num_retries))  # noqa: S311 - jitter
        self._num_retries += 1
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._retry.total_s
        return wait_s if now + wait_s < self._give_up_at else None


def _is_lost(response: httpx.Response) -> bool:
    """Whether a proxy gave up waiting for the service. The service's own 504 is a problem document, and is final."""
    return response.status_code == 504 and "problem+json" not in response.headers.get("Content-Type", "")
