"""Which outcomes of a call are retried, and after how long a delay."""

import httpx
import pytest

from service.client import retries
from service.client.retries import Attempts, Link, Retry


def response(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_the_backoff_doubles_up_to_a_cap() -> None:
    retry = Retry(first_s=0.5, max_s=3.0)
    assert [retry.backoff_s(n) for n in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert retry.backoff_s(10_000) == 3.0


def test_the_wait_is_at_least_what_retry_after_asks_for() -> None:
    attempts = Attempts(Retry(first_s=0.5, max_s=0.5))
    waits = [attempts.wait_s(response(503, Retry_After="7")) for _ in range(10)]
    assert all(wait is not None and 7.0 <= wait <= 7.5 for wait in waits)
    assert len(set(waits)) > 1, "the delay has no jitter: clients with the same Retry-After would all retry at once"


@pytest.mark.parametrize("header", ["soon", "-1", "nan", "1e9", "Wed, 21 Oct 2015 07:28:00 GMT", "٣"])
def test_a_retry_after_that_is_no_number_of_seconds_is_ignored(header: str) -> None:
    broken = httpx.Response(503, headers=[(b"Retry-After", header.encode())])
    wait = Attempts(Retry(first_s=0.1)).wait_s(broken)
    assert wait is not None
    assert 0.0 <= wait <= 0.1


@pytest.mark.parametrize("status", [200, 204, 400, 401, 404, 409, 410, 413, 422, 500, 504])
def test_other_answers_are_final(status: int) -> None:
    assert Attempts(Retry()).wait_s(response(status, Content_Type="application/problem+json")) is None


def test_a_timeout_of_a_proxy_is_a_lost_response() -> None:
    attempts = Attempts(Retry(max_retries=1))
    assert [attempts.wait_s(response(504)) is None for _ in range(2)] == [False, True]
    assert Attempts(Retry(), repeatable=False).wait_s(response(504)) is None


@pytest.mark.parametrize("kind", [httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.DecodingError])
def test_local_errors_are_not_retried(kind: type[httpx.RequestError]) -> None:
    assert Attempts(Retry()).wait_s(kind("no")) is None


@pytest.mark.parametrize("kind", [httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError, httpx.WriteError])
def test_a_lost_response_is_retried_max_retries_times(kind: type[httpx.RequestError]) -> None:
    attempts = Attempts(Retry(max_retries=2))
    assert [attempts.wait_s(kind("lost")) is None for _ in range(3)] == [False, False, True]


def reached() -> Link:
    link = Link()
    link.record(response(200))
    return link


@pytest.mark.parametrize(
    "outcome",
    [httpx.ConnectError("refused"), httpx.ConnectTimeout("no answer"), response(429), response(502), response(503)],
    ids=["refused", "unreachable", "429", "502", "503"],
)
def test_a_service_that_is_not_available_uses_time_and_no_attempts(
    outcome: httpx.Response | httpx.RequestError,
) -> None:
    attempts = Attempts(Retry(max_retries=0, total_s=1000.0), link=reached())
    assert all(attempts.wait_s(outcome) is not None for _ in range(100))
    assert Attempts(Retry(total_s=0.0), link=reached()).wait_s(outcome) is None


def test_a_service_that_was_never_reached_fails_at_once() -> None:
    refused = httpx.ConnectError("refused")
    assert Attempts(Retry()).wait_s(refused) is None
    assert Attempts(Retry(fail_fast=False)).wait_s(refused) is not None


def test_an_outage_is_reported_once_until_the_service_is_back(caplog: pytest.LogCaptureFixture) -> None:
    link = Link("http://there")
    for outcome in [response(200), *[httpx.ConnectError("refused")] * 3, response(503), response(200), response(503)]:
        Attempts(Retry(), link=link).wait_s(outcome)
    assert [record.getMessage() for record in caplog.records] == [
        "no answer from http://there (refused); retrying for up to 300 s",
        "http://there is not available (status 503); retrying for up to 300 s",
    ]


def test_a_full_queue_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    Attempts(Retry()).wait_s(response(429))
    assert caplog.records == []


def test_a_call_that_fails_late_has_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(retries.time, "monotonic", lambda: now)
    attempts = Attempts(Retry(total_s=60.0))
    now += 600.0
    assert attempts.wait_s(httpx.ReadError("lost")) is not None
    now += 61.0
    assert attempts.wait_s(httpx.ReadError("lost")) is None


def test_no_attempt_begins_after_the_total() -> None:
    assert Attempts(Retry(total_s=0.0)).wait_s(response(503)) is None
    assert Attempts(Retry(total_s=10.0)).wait_s(response(503, Retry_After="11")) is None
