"""Owns the log format: one line an event, console or JSON, with the request and episode ids of its context."""

import logging
import sys
from typing import Any, Literal

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
        render: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback  # the other one shows local variables, observations among them
        render = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for name in ("vllm", "alembic", "httpx"):  # their news is not the operator's
        logging.getLogger(name).setLevel(logging.WARNING)


def get(name: str) -> Any:
    """A structlog logger; keyword arguments become fields of the line."""
    return structlog.stdlib.get_logger(name)
