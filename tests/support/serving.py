"""Runs the service on a real socket in the test's event loop, and a client that calls it."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from service.api.http import server as http_server
from service.app import create_app
from service.engine.base import Engine
from service.engine.completion import Completion, Scores
from service.engine.supervisor import Callback, Load
from service.settings import Settings
from service.store.base import Store
from service.store.sql import SQLStore
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine

DISCRETE = {"type": "discrete", "actions": ["left", "right", "left turn", "go to the kitchen"]}


new_store: Callable[[], str] | None = None
"""Creates a database and returns its URL. Fixtures set it if services must not use a SQLite file in their folder."""

_stores: dict[Path, str] = {}
_sqlite_file: list[bytes] = []


def _store_of(folder: Path) -> str:
    """Returns the URL of the folder's database. A service that restarts in the same folder gets the same database."""
    assert new_store is not None
    if folder not in _stores:
        _stores[folder] = new_store()
    return _stores[folder]


async def _empty_sqlite_file() -> bytes:
    """Returns the file of an empty store. It is made once, because migrations take long."""
    if not _sqlite_file:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(data=Path(folder))
            async with SQLStore(settings.store_url):
                pass
            _sqlite_file.append((settings.data / "episodic.db").read_bytes())
    return _sqlite_file[0]


def _add(file: Path, content: bytes) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


class HeldEngine(ScriptedEngine):
    """An engine that answers only after `release` is set, so that a test controls how long an act is in flight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.release = asyncio.Event()
        self.num_held = 0

    async def generate(self, *args: Any, **options: Any) -> Completion:
        await self._hold()
        return await super().generate(*args, **options)

    async def score(self, *args: Any, **options: Any) -> Scores:
        await self._hold()
        return await super().score(*args, **options)

    async def _hold(self) -> None:
        self.num_held += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise


@dataclass
class Served:
    """A running service: its app, its URL, and a client."""

    app: FastAPI
    url: str
    client: httpx.AsyncClient
    name: str = "e"
    """The default episode id of the methods below."""

    @property
    def engine(self) -> Any:
        return self.app.state.services.sessions.agent.engine

    @property
    def store_url(self) -> str:
        return self.app.state.services.settings.store_url

    @property
    def path(self) -> str:
        return f"/episode/{self.name}"

    async def open(self, episode_id: str | None = None, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post("/episode", json={"episode_id": episode_id or self.name, **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def post_act(
        self, episode_id: str | None = None, observation: Any = "look", headers: Any = None, **fields: Any
    ) -> httpx.Response:
        body = {
            "episode_id": episode_id or self.name,
            **({} if observation is None else {"observation": observation}),
            **fields,
        }
        return await self.client.post("/act", json=body, headers=headers)

    async def act(self, episode_id: str | None = None, observation: Any = "look", **fields: Any) -> dict[str, Any]:
        answer = await self.post_act(episode_id, observation, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def trajectory(self, episode_id: str | None = None, format: str = "steps") -> dict[str, Any]:
        answer = await self.client.get(f"/episode/{episode_id or self.name}/trajectory", params={"format": format})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def get(self, episode_id: str | None = None) -> dict[str, Any]:
        answer = await self.client.get(f"/episode/{episode_id or self.name}")
        assert answer.status_code == 200, answer.text
        return answer.json()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the test runner handles signals

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # noqa: ASYNC110 - uvicorn's own loop polls only ten times a second
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serve(
    folder: Path,
    engine: Engine | Load | None,
    *,
    store: Store | None = None,
    loading: bool = False,
    on_ready: Callback = lambda: None,
    on_fatal: Callback = lambda: None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Runs the service on a free port, with its data in `folder`. With `loading`, it never becomes ready."""
    store = store or (MemoryStore() if loading else None)  # works without lifespan events
    if new_store is not None and "store" not in settings:
        settings["store"] = _store_of(folder)
    if store is None and "store" not in settings:
        _add(folder / "episodic.db", await _empty_sqlite_file())
    callbacks: Any = {"on_ready": on_ready, "on_fatal": on_fatal}
    app = create_app(Settings(data=folder, **settings), engine=engine, store=store, **callbacks)
    config = http_server.config(app, port=0, timeout_graceful_shutdown=10, lifespan="off" if loading else "on")
    server = _Server(config)
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started or running.done())
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    limits = httpx.Limits(max_connections=None)
    try:
        # Without `verify`, because each client would read all certificates, which takes as long as a test.
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits, verify=False) as client:  # noqa: S501
            if not loading:
                await until(lambda: app.state.services.lifecycle.unready_reason != "loading")
            yield Served(app, url, client)
    finally:
        server.should_exit = True
        await running


async def until(condition: Callable[[], Any]) -> None:
    """Waits until the condition is true. Raises TimeoutError after 20 s."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - no event signals this state
            await asyncio.sleep(0.002)
