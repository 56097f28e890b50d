"""Reads media types from headers. Their names compare without regard to case, and parameters do not matter."""

from starlette.requests import Request


def content_type(request: Request) -> str:
    """Returns the media type of the body in lower case, without parameters; empty if there is none."""
    return _name(request.headers.get("content-type", ""))


def accepts(request: Request, media_type: str) -> bool:
    """Returns whether the Accept header names this media type with a weight above 0. Wildcards do not count."""
    ranges = ",".join(request.headers.getlist("accept")).split(",")
    return any(_name(item) == media_type and _weight(item) > 0 for item in ranges)


def _name(value: str) -> str:
    return value.partition(";")[0].strip().lower()


def _weight(value: str) -> float:
    for parameter in value.split(";")[1:]:
        name, _, weight = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(weight)
            except ValueError:
                return 0
    return 1
