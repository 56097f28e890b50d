"""The fuzz targets. Each reads hostile bytes, and may raise only the error classes that it lists."""

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from starlette.requests import Request

from service.access.keys import Keyring, new_key
from service.agent.action_spaces import DiscreteSpace, JsonSpace, RegexSpace, ToolsSpace
from service.api.http import body, query, schemas, security
from service.api.http.middleware import request_id_of
from service.client.errors import EpisodicError as ClientError
from service.client.errors import reading
from service.client.streams import EventReader, LineReader
from service.engine.base import ActionSpaceRefused
from service.engine.decision_trie import DecisionTrie
from service.errors import EpisodicError
from service.store.base import NEWEST_FIRST, Ordering
from service.trajectory import Sampling
from service.validation import strict_json

_MODELS = (
    *(schemas.EpisodeRequest, schemas.ActRequest, schemas.BatchRequest, schemas.RecordRequest),
    *(schemas.ForkRequest, schemas.FeedbackRequest, schemas.AdapterRequest, schemas.EndRequest),
)


@dataclass(frozen=True)
class Target:
    """`run` receives the bytes, and a generator for its random choices. It may raise only the `allowed` errors."""

    run: Callable[[bytes, random.Random], None]
    allowed: tuple[type[Exception], ...]
    corpus: Sequence[bytes]


def _bytes(*documents: Any) -> list[bytes]:
    return [json.dumps(document).encode() for document in documents]


def read_body(data: bytes, generator: random.Random) -> None:
    """Reads a request body: JSON parsing, digest, validation."""
    document = body._parse(data)
    body.digest(document if isinstance(document, dict) else {"value": document})
    if isinstance(document, dict):
        body.validated(document, generator.choice(_MODELS))


def build_space(data: bytes, generator: random.Random) -> None:
    """Uses a schema as an action space and as a tool's parameters, and parses an action with it."""
    value = _json(data)
    if not isinstance(value, dict):
        RegexSpace.of({"pattern": str(value)})
        return
    try:
        space = JsonSpace.of({"schema": value})
        _, failure = space.parse(
            generator.choice(('{"a":[1,{"b":2}]}', "[]", "x", data.decode(errors="replace"))), "stop"
        )
        assert failure is None or failure.detail
    except ActionSpaceRefused:
        ToolsSpace.of({"tools": [{"name": "tool", "parameters": value}]})
        raise
    ToolsSpace.of({"tools": [{"name": "tool", "parameters": value}]})


def build_trie(data: bytes, generator: random.Random) -> None:
    """Splits the bytes into actions. A legal action must be drawn, and the probabilities must sum to 1."""
    actions = tuple(data.decode(errors="replace").split(generator.choice((",", '"', " "))))
    trie = DecisionTrie(DiscreteSpace.of({"actions": actions}).actions, lambda text: list(text.encode()), 256)
    scores = [[generator.choice((0.0, -1.0, float("-inf"))) for _ in branch.children] for branch in trie.branches]
    drawn = trie.draw(scores, Sampling(temperature=generator.choice((0.0, 0.5, 1.0))), generator)
    assert drawn.action in actions
    assert abs(sum(drawn.probs.values()) - 1) < 1e-6


def read_events(data: bytes, generator: random.Random) -> None:
    _fed(EventReader(), data, generator)


def read_lines(data: bytes, generator: random.Random) -> None:
    _fed(LineReader(), data, generator)


def read_cursor(data: bytes, generator: random.Random) -> None:
    *numbers, episode_id = query.read_cursor(data.decode(errors="replace"), generator.choice(_ORDERINGS))
    assert all(isinstance(number, float) for number in numbers)
    assert isinstance(episode_id, str)


def read_headers(data: bytes, generator: random.Random) -> None:
    """Reads each header that the service uses, with API keys in the store and without."""
    name = generator.choice((b"authorization", b"host", b"origin", b"x-request-id", b"x-episode-id"))
    scope = {"type": "http", "method": "GET", "path": "/episode", "headers": [(name, data)], "services": _SERVICES}
    request_id = request_id_of([(name, data)])
    assert request_id is None or request_id.isascii()
    keyring = generator.choice((_KEYS, _NO_KEYS))
    found = _now(security.Security(_nothing, keyring, loopback=True)._caller(Request(scope), "read"))
    assert keyring is _NO_KEYS or data.endswith(_KEY.encode())
    assert found.tenant


def _fed(reader: Any, data: bytes, generator: random.Random) -> None:
    cut = generator.randrange(len(data) + 1)
    for chunk in (data[:cut], data[cut:]):
        with reading("fuzz"):
            list(reader.feed(chunk))
    reader.end()


def _json(data: bytes) -> Any:
    try:
        return strict_json.parse(data, object_pairs_hook=strict_json.without_twins)
    except ValueError:
        return data.decode(errors="replace")


async def _nothing(*_: Any) -> None: ...


class _Store:
    """A store that contains only these keys."""

    def __init__(self, *records: Any) -> None:
        self._records = list(records)

    async def keys(self) -> list[Any]:
        return self._records


def _now(awaited: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine that never suspends, and returns its result."""
    try:
        awaited.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("the coroutine suspended")


_KEY, _RECORD = new_key("tenant", ("read",), 0.0)
_SERVICES = SimpleNamespace(settings=SimpleNamespace(cors_origins=("https://trusted.example",)))
_STORE: Any = _Store(_RECORD)
_EMPTY: Any = _Store()
_KEYS, _NO_KEYS = Keyring(_STORE), Keyring(_EMPTY)

_ORDERINGS = (NEWEST_FIRST, Ordering("return", "asc"), Ordering("rating", "desc"))

_TREE = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}}, "c": {"enum": ["x", 1, None]}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"b": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^a+$"}]}},
}
_ACT = {
    "episode_id": "e",
    "observation": [{"type": "text", "text": "look"}],
    "reward": 1.0,
    "step": 3,
    "info": {"a": 1},
}
_EPISODE = {
    "episode_id": "e",
    "goal": "g",
    "action_space": {"type": "discrete", "actions": ["left", "right"]},
    "sampling": {"temperature": 0.5, "top_k": 3, "stop": ["x"]},
    "context": {"overflow": "slide", "max_tokens": 100},
    "tags": ["a"],
    "metadata": {"k": [1, 2.5, None, "v"]},
}

TARGETS = {
    "body": Target(
        read_body,
        (EpisodicError,),
        _bytes(
            _ACT,
            _EPISODE,
            {**_EPISODE, "action_space": {"type": "json", "schema": _TREE}},
            {**_EPISODE, "action_space": {"type": "tools", "tools": [{"name": "t", "parameters": _TREE}]}},
            {"acts": [_ACT, _ACT]},
            {"rating": 5, "comment": "c", "rater": "r", "step": 0},
            {"at_step": 2, "n": 3},
            {"terminated": True, "success": None, "reward": -1},
        ),
    ),
    "space": Target(
        build_space,
        (ActionSpaceRefused,),
        _bytes(
            _TREE,
            {"type": "array", "prefixItems": [{"const": 1}], "items": {"not": {"type": "null"}}, "uniqueItems": True},
            {"oneOf": [{"type": "string", "format": "date"}, {"type": "number", "multipleOf": 0.1}]},
            {"allOf": [{"if": {"type": "string"}, "then": {"maxLength": 3}}], "$dynamicAnchor": "n"},
            {"type": "object", "patternProperties": {"^a": {}}, "dependentRequired": {"a": ["b"]}},
        ),
    ),
    "trie": Target(
        build_trie, (ActionSpaceRefused,), [b"left,right,left turn,go to the kitchen", b"a,aa,aaa,b", b"\xc3\xa9,e"]
    ),
    "events": Target(
        read_events,
        (ClientError,),
        [
            b'event: text\ndata: {"delta": "a"}\n\nevent: act\ndata: {"episode_id": "e", "step": 0}\n\n',
            b'event: reasoning\ndata: {"delta":\ndata: "b"}\n\n',
            b'event: error\ndata: {"status": 409, "code": "step_conflict", "detail": "d", "expected_step": 2}\n\n',
        ],
    ),
    "lines": Target(read_lines, (ClientError,), [b'{"a": 1}\n{"b": [2]}\n', b'{"a": "x"}\r\n\n']),
    "cursor": Target(read_cursor, (EpisodicError,), [b"WzEuNSwiZSJd", b"W251bGwsbnVsbF0", b"e30"]),
    "headers": Target(
        read_headers,
        (EpisodicError,),
        [f"Bearer {_KEY}".encode(), b"localhost:8000", b"[::1]:8000", b"https://example.org", b"r-1", b"Basic YTpi"],
    ),
}


def prepare() -> None:
    """Makes the keyrings read their stores, so that the targets never suspend."""
    for keyring in (_KEYS, _NO_KEYS):
        asyncio.run(keyring.exists())
        keyring._read_at = float("inf")
