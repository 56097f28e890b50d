"""The blocking client and the asyncio client have the same methods with the same parameters."""

import inspect
from typing import Any

import pytest

from episodic import AsyncClient, AsyncEpisode, Client, Episode

PAIRS = [(Client, AsyncClient), (Episode, AsyncEpisode)]
RENAMED = {"close": "aclose", "__enter__": "__aenter__", "__exit__": "__aexit__"}


def calls(kind: type[Any]) -> dict[str, inspect.Signature]:
    """The public methods of a class and its methods for `with`."""
    named = inspect.getmembers(kind, inspect.isfunction)
    return {name: inspect.signature(call) for name, call in named if not name.startswith("_") or name in RENAMED}


def shape(signature: inspect.Signature) -> list[tuple[str, Any, Any, str]]:
    """Names, kinds, defaults and annotations of the parameters. "Async" is removed from the annotations."""
    return [
        (one.name, one.kind, one.default, str(one.annotation).replace("Async", ""))
        for one in signature.parameters.values()
        if one.name != "transport"  # httpx has a different type for each client
    ]


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_they_have_the_same_calls_with_the_same_parameters(blocking: type[Any], asynchronous: type[Any]):
    ours, theirs = calls(blocking), calls(asynchronous)
    assert len(ours) > 8
    public = {name for name in theirs if not name.startswith("_")} - {"aclose"}
    assert {name for name in ours if name not in RENAMED} == public
    for name in public:
        assert shape(ours[name]) == shape(theirs[name]), name


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_they_are_made_alike(blocking: type[Any], asynchronous: type[Any]):
    assert shape(inspect.signature(blocking)) == shape(inspect.signature(asynchronous))
