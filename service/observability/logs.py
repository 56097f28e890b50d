"""Configures logging: one line for each event, as console text or JSON, with the ids of the request and the episode.

The contents of requests and answers, such as observations and actions, are never logged. Within a request the messages
of exceptions are left out, because they may quote them. Control characters are escaped, so that no text can forge a
log line.
"""

import logging
import re
import sys
import time
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal, cast

import structlog

from service.observability.metrics import SUPPRESSED_LOG_LINES


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Sets up logging to standard error, with one format for the service's events and for the records of libraries.

    `level` is the name of the lowest level that is logged, in either case.
    """
    shared: list[Any] = [
        _add_request,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        render: list[Any] = [_format_exception, structlog.processors.JSONRenderer()]
    else:
        render = [
            _format_exception,
            _escape,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False),
        ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    foreign: list[Any] = [*shared, structlog.stdlib.ExtraAdder(), _drop_colors]
    handler = logging.StreamHandler()
    handler.addFilter(RateLimit())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=foreign,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(True)
    for name in ("alembic", "httpx", "uvicorn"):  # their info records do not help an operator
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("vllm", "py.warnings"):  # nor do these warnings: they are the same at each start
        logging.getLogger(name).setLevel(logging.WARNING if level == "debug" else logging.ERROR)


_request: ContextVar[Mapping[str, str]] = ContextVar("request")


def set_request(ids: Mapping[str, str]) -> None:
    """Sets the fields of all log lines of this request: its id, and that of the episode."""
    _request.set(ids)


def _add_request(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    return {**_request.get({}), **event}


def get(name: str) -> Any:
    """Returns a structlog logger. Keyword arguments of its methods become fields of the log line."""
    return structlog.stdlib.get_logger(name)


_MAX_LINES = 20
_WINDOW_S = 10.0
_MAX_KEYS = 1_000


class RateLimit(logging.Filter):
    """Limits repeated lines, so that an outage does not flood the log.

    Of each event, at most 20 lines are logged in 10 seconds. The first line after that has `num_suppressed`, the number
    of lines left out. The limit applies to warnings, errors, and requests that failed; the latter by status.
    """

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[Any, list[float]] = {}  # by key: end of the window, lines logged, lines left out

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether to log the record."""
        message = cast("object", record.msg)
        event = cast("dict[str, Any]", message) if isinstance(message, dict) else None
        status = event.get("status") if event else None
        is_failed = isinstance(status, int) and status >= 400
        if record.levelno < logging.WARNING and not is_failed:
            return True
        now = time.monotonic()
        key = (record.name, event.get("event") if event else str(record.msg), status)
        ends_at, num_logged, num_left_out = self._windows.get(key, (0.0, 0.0, 0.0))
        if now < ends_at and num_logged >= _MAX_LINES:
            self._windows[key][2] += 1
            SUPPRESSED_LOG_LINES.inc()
            return False
        if len(self._windows) >= _MAX_KEYS:
            self._windows.clear()
        if now < ends_at:
            self._windows[key] = [ends_at, num_logged + 1, num_left_out]
            return True
        self._windows[key] = [now + _WINDOW_S, 1, 0]
        if num_left_out and event is not None:
            event["num_suppressed"] = int(num_left_out)
        elif num_left_out:
            record.num_suppressed = int(num_left_out)
        return True


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MAX_FRAMES = 40


def _drop_colors(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Removes the second copy of the message that Uvicorn adds to its records, with terminal colors."""
    event.pop("color_message", None)
    return event


def _format_exception(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Replaces `exc_info` with the traceback as text, in the field `exception`. It has no values of local variables."""
    exc_info: Any = event.pop("exc_info", None)
    given = cast("Any", exc_info)[1] if isinstance(exc_info, tuple) else exc_info
    error = sys.exc_info()[1] if exc_info is True else given
    if isinstance(error, BaseException):
        # asyncio reports failed tasks that nobody awaited, outside of the request that started them.
        with_messages = "request_id" not in event and event.get("logger") != "asyncio"
        event["exception"] = "\n".join(_trace(error, with_messages, set()))
    return event


def _trace(error: BaseException, with_messages: bool, seen: set[int]) -> list[str]:
    """Returns the lines of a traceback: of the error's cause or context, of the error, and of the errors in a group."""
    if id(error) in seen:
        return []
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [*_trace(before, with_messages, seen), "which led to:"] if before else []
    for frame in traceback.format_tb(error.__traceback__, -_MAX_FRAMES):
        lines += frame.rstrip("\n").split("\n")
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    lines.append(_escaped(f"{name}: {error}" if with_messages else name))
    if isinstance(error, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            lines += ["exception in the group:", *_trace(inner, with_messages, seen)]
    return lines


def _escape(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Escapes control characters for the console (JSON has its own escapes) and indents the lines of a traceback."""
    trace = event.pop("exception", None)
    escaped = {name: _escaped(value) if isinstance(value, str) else value for name, value in event.items()}
    if trace:
        escaped["exception"] = "\n".join(f"  | {_escaped(line)}" for line in trace.split("\n"))
    return escaped


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
