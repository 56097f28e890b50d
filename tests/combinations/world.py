"""Two replicas of the service on one store in one process, with faults, a clock, and calls that can be broken off."""

import asyncio
import contextlib
import itertools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from service.access import admission
from service.access.keys import new_key
from service.app import create_app
from service.engine.completion import Completion, Scores
from service.engine.tokenizer import HFTokenizer, Tokenizer
from service.lifecycle import Phase
from service.settings import Quota, Settings
from service.store.base import Commit, StoreUnavailable
from service.store.sql import SQLStore
from service.trajectory import Step
from tests.support.serving import HeldEngine

Gate = Literal["engine", "commits"]
Fault = Literal["lost", "stored", "unknown"]
"""A commit that fails: it is not stored, it is stored, or it is stored and the store cannot be read afterwards."""

QUOTAS = {"free": Quota(), "tight": Quota(concurrent_acts=2, active_episodes=3), "slow": Quota(calls_per_s=2)}
TENANTS = tuple(QUOTAS)
NUM_REPLICAS = 2
LIMIT_S = 20.0
"""Seconds after which a call that should be answered counts as hanging."""


class Clock:
    """The time that the service sees: the real time and what `advance` has added. Rate limits see only the latter."""

    def __init__(self) -> None:
        self._real, self._added = time.time, 0.0

    def advance(self, seconds: float) -> None:
        self._added += seconds

    def now(self) -> float:
        return self._real() + self._added

    def monotonic(self) -> float:
        return self._added

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        limits = SimpleNamespace(monotonic=self.monotonic)
        with (
            mock.patch.object(time, "time", self.now),
            mock.patch.object(admission, "time", limits),
        ):
            yield


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that knows how many of its calls run in threads."""

    num_in_threads = 0

    def run_in_executor(self, *args: Any) -> Any:
        self.num_in_threads += 1
        running = super().run_in_executor(*args)
        running.add_done_callback(self._one_less)
        return running

    def _one_less(self, _: object) -> None:
        self.num_in_threads -= 1


async def quiescence() -> None:
    """Waits until nothing can go on by itself: each task waits for a gate, a timer or a socket."""
    loop, num_idle = asyncio.get_running_loop(), 0
    assert isinstance(loop, CountingLoop)
    while num_idle < 25:
        await asyncio.sleep(0.0005 if loop.num_in_threads else 0)
        num_idle = 0 if loop.num_in_threads else num_idle + 1


def tasks() -> Counter[str]:
    """Returns the number of tasks of the event loop, by name."""
    return Counter(task.get_name().rstrip("-0123456789") for task in asyncio.all_tasks())


class World:
    """The replicas, their store and their faults."""

    def __init__(self, store_url: str, folder: Path, tokenizer: Tokenizer) -> None:
        self.clock = Clock()
        self.store_url, self.folder, self.tokenizer = store_url, folder, tokenizer
        self.keys = {tenant: new_key(tenant, ("act", "read"), 0.0) for tenant in TENANTS}
        self.replicas = [Replica(self, number) for number in range(NUM_REPLICAS)]
        self.background_failures: list[str] = []
        self.log: list[str] = []
        self.num_sequences = 0
        self.numbers = itertools.count()

    async def start(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_failure)
        async with SQLStore(self.store_url) as store:
            for _, record in self.keys.values():
                await store.add_key(record)
        for replica in self.replicas:
            await replica.start()
        await quiescence()
        self.num_tasks = tasks()

    async def stop(self) -> None:
        for replica in self.replicas:
            await replica.stop()

    def _on_failure(self, _: object, context: dict[str, Any]) -> None:
        self.background_failures.append(f"{context.get('message')} {context.get('exception')!r}")


class Replica:
    """One process of the service. It can be restarted, and its engine and its store can fail."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.gate: Gate | None = None
        self.fault: Fault | None = None
        self.may_load = asyncio.Event()
        self.may_load.set()
        self._running = AsyncExitStack()

    async def start(self) -> None:
        world = self.world
        self.store = FaultyStore(world.store_url, self)
        settings: dict[str, Any] = {"data": world.folder / str(self.number), "store": world.store_url}
        settings |= {"max_running_acts": 4, "max_queued_acts": 2, "max_live_episodes": 3, "tenants": QUOTAS}
        settings |= {"engine_backoff_s": 0, "engine_max_failures": 1_000_000, "engine_canary_s": 1000}
        self.app = create_app(Settings(**settings), engine=self._load, store=self.store)
        await self._running.enter_async_context(self.app.router.lifespan_context(self.app))
        await self.until_ready()

    async def stop(self) -> None:
        """Stops as after SIGTERM: acts that do not complete are aborted."""
        services = self.services
        services.lifecycle.enter(Phase.DRAINING)
        await services.sessions.abort_acts()
        self.open_gate()
        await quiescence()
        await self._running.aclose()

    async def _load(self) -> "FaultyEngine":
        await self.may_load.wait()
        self.engine = FaultyEngine(self)
        return self.engine

    async def until_ready(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            while self.services.lifecycle.unready_reason is not None:  # noqa: ASYNC110 - no event signals this state
                await asyncio.sleep(0.001)

    @property
    def services(self) -> Any:
        return self.app.state.services

    def close_gate(self, gate: Gate) -> None:
        self.gate = gate
        (self.engine.release if gate == "engine" else self.store.release).clear()

    def open_gate(self) -> None:
        self.gate = None
        self.engine.release.set()
        self.store.release.set()

    def kill_engine(self) -> None:
        """Ends the engine. The next one is loaded once `may_load` is set."""
        self.may_load.clear()
        self.engine.die()
        self.engine.release.set()


class FaultyEngine(HeldEngine):
    """An engine whose actions are all different, that waits at a gate, and whose scores may be NaN."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica.world.tokenizer, reply=self._reply_to)
        self._numbers = replica.world.numbers
        self.has_nan = False
        if replica.gate != "engine":
            self.release.set()

    def _reply_to(self, prompt: str) -> str:
        number = next(self._numbers)
        if prompt.endswith("<think>\n"):
            return f"thought {number}</think>"
        kinds = re.findall(r"space (\w+)", prompt)
        value: Any = {"n": number if number % 5 else "x"}  # every fifth one is no action
        match kinds[0] if kinds else "text":
            case "json":
                return json.dumps(value)
            case "tools":
                return json.dumps({"name": "go", "arguments": value})
            case "regex":
                return f"n{number}"
            case _:
                return f"text {number}"

    async def score(self, *args: Any, **options: Any) -> Scores:
        scores = await super().score(*args, **options)
        return Scores((math.nan,) * len(scores.logprobs), 0) if self.has_nan else scores

    async def generate(self, *args: Any, **options: Any) -> Completion:
        drawn = await super().generate(*args, **options)
        return (
            Completion(drawn.token_ids, (math.nan,) * len(drawn.token_ids), drawn.text, drawn.finish_reason, 0)
            if self.has_nan
            else drawn
        )


class FaultyStore(SQLStore):
    """A store whose commits wait at a gate, and of which one may fail."""

    def __init__(self, url: str, replica: Replica) -> None:
        super().__init__(url)
        self._replica = replica
        self._num_unreadable = 0
        self.release = asyncio.Event()
        if replica.gate != "commits":
            self.release.set()

    async def commit(self, commit: Commit) -> None:
        await self.release.wait()
        fault, self._replica.fault = self._replica.fault, None
        if fault != "lost":
            await super().commit(commit)
        if fault:
            self._num_unreadable = fault == "unknown"
            raise StoreUnavailable("injected")

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        if self._num_unreadable:
            self._num_unreadable -= 1
            raise StoreUnavailable("injected")
        return await super().steps(episode_id, index)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.content) if self.content else None


@dataclass
class Call:
    """An HTTP request to a replica, as uvicorn would pass it on. `leave` breaks it off."""

    replica: Replica
    method: str
    path: str
    key: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    query: str = ""

    def start(self) -> "Call":
        self._received = False
        self._left = asyncio.Event()
        self._status, self._headers, self._parts = 0, dict[str, str](), list[bytes]()
        self._is_complete = False
        self._task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> None:
        given = {"authorization": f"Bearer {self.key}", "content-length": str(len(self.body)), **self.headers}
        headers = [(name.lower().encode(), value.encode()) for name, value in given.items()]
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        scope |= {"method": self.method, "path": self.path, "raw_path": self.path.encode(), "scheme": "http"}
        scope |= {"query_string": self.query.encode(), "headers": headers, "root_path": ""}
        scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}
        with contextlib.suppress(Exception):  # it is raised again after it was answered with 500
            await self.replica.app(scope, self._receive, self._send)
        self._is_complete = True
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._received:
            self._received = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self._parts.append(message.get("body", b""))

    def leave(self) -> None:
        self._left.set()

    @property
    def done(self) -> bool:
        return self._task.done()

    async def wait(self, limit_s: float = LIMIT_S) -> bool:
        """Waits for the end of the call. Returns whether it came in time."""
        return bool((await asyncio.wait({self._task}, timeout=limit_s))[0])

    @property
    def answer(self) -> Answer:
        assert self._is_complete
        self._task.result()
        return Answer(self._status, self._headers, b"".join(self._parts))


def packaged_tokenizer() -> HFTokenizer:
    from transformers import AutoTokenizer

    import service

    return HFTokenizer(AutoTokenizer.from_pretrained(Path(service.__file__).parent / "packaged/policies/toy-text"))
