"""Logs: one line for each event with its ids, valid JSON if configured, no forged lines, and no data of callers."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog

from service.engine.tokenizer import HFTokenizer
from service.observability import logs
from service.observability.logs import RateLimit
from service.testing.scripted_engine import ScriptedEngine
from tests.api.http.test_problems import BrokenEngine
from tests.support.serving import DISCRETE, HeldEngine, serve, until

Format = Literal["console", "json"]
FORMATS: list[Format] = ["console", "json"]
PRIVATE = "a secret word"


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Returns a function that configures logging, and returns a function that reads the lines written since then.

    Restores the root logger after the test.
    """
    root = logging.getLogger()
    before = list(root.handlers), root.level

    def configure(log_format: Format, level: str = "info") -> Any:
        structlog.reset_defaults()
        logs.configure(log_format, level)

        def lines() -> list[str]:
            return capsys.readouterr().err.splitlines()

        return lines

    yield configure
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    structlog.reset_defaults()


async def test_json_lines_carry_the_request_and_episode_ids(log: Any, tmp_path: Path, tokenizer: HFTokenizer):
    lines = log("json", "debug")
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.open()
        await api.post_act(headers={"X-Request-ID": "r-1", "X-Episode-Id": "e"})
        await api.post_act("nobody", headers={"X-Request-ID": "r-2", "X-Episode-Id": "nobody"})
    events = [json.loads(line) for line in lines()]
    assert {"event", "level", "logger", "timestamp"} <= set.intersection(*map(set, events))
    requests = {event["request_id"]: event for event in events if event["event"] == "request"}
    assert requests["r-1"].items() >= {"episode_id": "e", "method": "POST", "path": "/act", "status": 200}.items()
    assert requests["r-2"].items() >= {"episode_id": "nobody", "status": 404, "level": "info"}.items()
    assert [event["append_only"] for event in events if event["event"] == "ready"] == [True]


async def test_served_and_overloaded_acts_are_logged_at_debug_level(log: Any, tmp_path: Path, tokenizer: HFTokenizer):
    lines = log("json", "info")
    engine = HeldEngine(tokenizer)
    async with serve(tmp_path, engine, max_running_acts=1, max_queued_acts=0) as api:
        await api.open()
        acting = asyncio.create_task(api.post_act())
        await until(lambda: engine.num_held)
        assert (await api.post_act()).status_code == 429
        engine.release.set()
        assert (await acting).status_code == 200
        assert (await api.post_act("nobody")).status_code == 404
        await api.client.get("/healthz")
    events = [json.loads(line) for line in lines() if '"request"' in line]
    assert [(event["path"], event["status"]) for event in events] == [("/episode", 201), ("/act", 404)]


HOSTILE = 'x\n2026-01-01 [critical] the engine died\r\n{"event": "forged", "level": "critical"}\u2028\x1b[2J'


@pytest.mark.parametrize("log_format", FORMATS)
async def test_callers_cannot_forge_log_lines(log: Any, tmp_path: Path, tokenizer: HFTokenizer, log_format: Format):
    lines = log(log_format, "debug")
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.client.get("/" + "".join(f"%{byte:02x}" for byte in HOSTILE.encode()))
        await api.client.get("/healthz", headers={"X-Request-ID": "a b", "X-Episode-Id": "\x1b[2Jforged"})
        await api.client.post("/act", content=json.dumps({"episode_id": HOSTILE, HOSTILE: 1}).encode())
        await api.client.post("/episode", json={"goal": HOSTILE, "action_space": {"type": HOSTILE}})
    written = lines()
    assert sum("event" in line or "[" in line for line in written) == len(written)
    if log_format == "json":
        assert all(json.loads(line)["event"] != "forged" for line in written)
    else:
        assert all(line.startswith("20") and not line.startswith("2026-01-01") for line in written)
    assert not any("\x1b[2J" in line for line in written)


@pytest.mark.parametrize("log_format", FORMATS)
async def test_an_unexpected_failure_is_told_with_its_trace_and_request(
    log: Any, tmp_path: Path, tokenizer: HFTokenizer, log_format: Format
):
    lines = log(log_format)
    async with serve(tmp_path, BrokenEngine(tokenizer)) as api:
        await api.open(action_space=DISCRETE)
        await api.post_act(observation="a secret word", headers={"X-Request-ID": "find-me"})
    written = lines()
    text = "\n".join(written)
    assert "ZeroDivisionError" in text
    assert "find-me" in text
    assert "a secret word" not in text, "the traceback must not contain values of local variables"
    if log_format == "json":
        events = [json.loads(line) for line in written]
        (failure,) = [event for event in events if event["event"] == "unexpected_failure"]
        assert failure["request_id"] == "find-me"
        assert "ZeroDivisionError" in failure["exception"]
        assert [event["status"] for event in events if event["event"] == "request"][-1] == 500


@pytest.mark.parametrize("log_format", FORMATS)
def test_library_records_have_the_service_format(log: Any, log_format: Format):
    lines = log(log_format)
    logging.getLogger("some.library").warning("%s happened", "something", extra={"count": 3, "color_message": "x"})
    logging.getLogger("httpx").info("noise")
    (line,) = lines()
    assert "something happened" in line
    assert "some.library" in line
    assert "color_message" not in line
    if log_format == "json":
        assert json.loads(line)["count"] == 3


@pytest.mark.parametrize("log_format", FORMATS)
async def test_exception_messages_within_a_request_are_not_logged(
    log: Any, tmp_path: Path, tokenizer: HFTokenizer, log_format: Format
):
    class QuotingEngine(ScriptedEngine):
        async def score(self, *args: Any, **options: Any) -> Any:
            try:
                raise ValueError(PRIVATE)
            except ValueError as error:
                raise ExceptionGroup(PRIVATE, [KeyError(PRIVATE)]) from error

    lines = log(log_format, "debug")
    async with serve(tmp_path, QuotingEngine(tokenizer)) as api:
        await api.open(action_space=DISCRETE, goal="a secret word")
        assert (await api.post_act(observation="a secret word")).status_code == 500
    text = "\n".join(lines())
    assert all(name in text for name in ("ValueError", "ExceptionGroup", "KeyError", "which led to", "in score"))
    assert "secret" not in text


@pytest.mark.parametrize("level", ["debug", "info"])
@pytest.mark.parametrize("log_format", FORMATS)
async def test_logs_contain_no_observations_or_actions(
    log: Any, tmp_path: Path, tokenizer: HFTokenizer, log_format: Format, level: str
):
    lines = log(log_format, level)
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.open(goal="a secret word", instructions="a secret word", metadata={"a": "a secret word"})
        await api.act(observation="a secret word", info={"b": "a secret word"})
        await api.client.post("/act", json={"episode_id": "e", "a secret word": "a secret word"})
        await api.client.post("/act", content=b'{"a secret word')
        await api.client.post("/episode/e/end", json={"terminated": True, "info": {"c": "a secret word"}})
        await api.client.post("/episode/e/feedback", json={"rating": 5, "comment": "a secret word"})
        await api.trajectory()
    assert "secret" not in "\n".join(lines())


@pytest.mark.parametrize("log_format", FORMATS)
def test_failures_outside_a_request_are_logged_with_full_traceback(log: Any, log_format: Format):
    lines = log(log_format)
    structlog.contextvars.clear_contextvars()
    try:
        raise OSError("no such model\n2026-01-01 [critical] forged")
    except OSError:
        logs.get("service").exception("engine_load_failed")
    logging.getLogger("some.library").error("first\n2026-01-01 [critical] forged\x1b[2J")
    written = lines()
    text = "\n".join(written)
    assert "OSError: no such model" in text
    assert "\x1b" not in text
    if log_format == "json":
        assert [json.loads(line)["level"] for line in written] == ["error", "error"]
    else:
        events = [line for line in written if not line.startswith("  | ")]
        assert len(events) == 2, "every other line is indented"
        assert all("[error" in line for line in events)


def test_a_lost_tasks_failure_is_told_without_its_message(log: Any):
    lines = log("console")
    try:
        raise ValueError(PRIVATE)
    except ValueError as error:
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    text = "\n".join(lines())
    assert "ValueError" in text
    assert "secret" not in text


# --- repeated lines


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> tuple[RateLimit, list[float]]:
    """A limit, and its clock: `clock[0]` is the time in seconds."""
    clock = [100.0]
    monkeypatch.setattr("service.observability.logs.time.monotonic", lambda: clock[0])
    return RateLimit(), clock


def line(event: str, level: int = logging.ERROR, **fields: Any) -> logging.LogRecord:
    return logging.LogRecord("service.x", level, "", 0, {"event": event, **fields}, None, None)  # type: ignore[arg-type]


def test_an_outage_does_not_flood_the_log(limit: tuple[RateLimit, list[float]]):
    limited, clock = limit
    lines = [line("store_unavailable") for _ in range(1000)]
    requests = [line("request", logging.INFO, status=503) for _ in range(1000)]
    assert sum(map(limited.filter, lines)) == 20
    assert sum(map(limited.filter, requests)) == 20
    assert limited.filter(line("engine_died")), "another event has its own limit"
    assert limited.filter(line("request", logging.INFO, status=500)), "another status has its own limit"
    clock[0] += 10.0
    following = line("store_unavailable")
    assert limited.filter(following)
    assert following.msg["num_suppressed"] == 980  # type: ignore[index]
    assert all(limited.filter(line("request", logging.INFO, status=200)) for _ in range(1000))
    assert all(limited.filter(line("purged", logging.INFO)) for _ in range(1000))


def test_lines_of_libraries_are_limited_too(limit: tuple[RateLimit, list[float]]):
    limited, clock = limit

    def foreign() -> logging.LogRecord:
        return logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "Exception in %s", ("x",), None)

    assert sum(limited.filter(foreign()) for _ in range(100)) == 20
    clock[0] += 10.0
    following = foreign()
    assert limited.filter(following)
    assert following.__dict__["num_suppressed"] == 80
