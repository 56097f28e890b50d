"""Owns the log format: one line an event, console or JSON, with the request and episode ids of its context.

What a caller sent is no one's to read here: no observation, no action, and no message of an exception within a request,
which may quote either. A control character is written as its escape, so that no text makes a line of its own.
"""

import logging
import re
import sys
import traceback
from typing import Any, Literal, cast

import structlog


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Formats our events and every library's records alike, to standard error."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        render: list[Any] = [_tell_exception, structlog.processors.JSONRenderer()]
    else:
        render = [_tell_exception, _escape, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    foreign: list[Any] = [*shared, structlog.stdlib.ExtraAdder(), _drop_colors]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=foreign,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for name in ("vllm", "alembic", "httpx"):  # their news is not the operator's
        logging.getLogger(name).setLevel(logging.WARNING)


def get(name: str) -> Any:
    """A structlog logger; keyword arguments become fields of the line."""
    return structlog.stdlib.get_logger(name)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MAX_FRAMES = 40


def _drop_colors(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Uvicorn's records hold their message twice, once with escapes for a terminal."""
    event.pop("color_message", None)
    return event


def _tell_exception(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Puts the trace of `exc_info` into the event. It shows no local variable."""
    given: Any = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else cast("Any", given)[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        with_messages = "request_id" not in event and event.get("logger") != "asyncio"  # it tells of lost tasks
        event["exception"] = "\n".join(_trace(error, with_messages, set()))
    return event


def _trace(error: BaseException, with_messages: bool, seen: set[int]) -> list[str]:
    """The lines of a traceback: of what led to the error, its own, and of what it holds."""
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
            lines += ["within it:", *_trace(inner, with_messages, seen)]
    return lines


def _escape(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    """Of a console's event; JSON escapes by itself. The lines of a trace are set off from events."""
    trace = event.pop("exception", None)
    escaped = {name: _escaped(value) if isinstance(value, str) else value for name, value in event.items()}
    if trace:
        escaped["exception"] = "\n".join(f"  | {_escaped(line)}" for line in trace.split("\n"))
    return escaped


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
