"""The drain delay: calls are served until the load balancer has noticed that the replica is leaving."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from service.api.http import server as http_server
from service.api.http.shutdown import DrainingServer
from service.app import create_app
from service.engine.tokenizer import HFTokenizer
from service.settings import Settings
from service.testing.scripted_engine import ScriptedEngine
from tests.support.postgres import free_port


@asynccontextmanager
async def draining(folder: Path, tokenizer: HFTokenizer, **settings: float) -> AsyncIterator[tuple[str, asyncio.Task]]:
    """Serves with a scripted engine. Gives the URL, and the task that ends with the server."""
    used = Settings(data=folder, **settings)
    app = create_app(used, engine=ScriptedEngine(tokenizer))
    port = free_port()
    config = http_server.config(app, host="127.0.0.1", port=port, lifespan="off")
    server = DrainingServer(config, drain_delay_s=used.drain_delay_s, drain_s=used.drain_s)
    task = asyncio.create_task(server.serve())
    while not server.started or app.state.services.lifecycle.routing_reason:  # noqa: ASYNC110 - uvicorn has no event
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", task
    finally:
        server.should_exit = True
        await task
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)


async def test_calls_that_still_arrive_after_the_drain_delay_are_served(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    async with draining(tmp_path, tokenizer, drain_delay_s=0.01) as (url, ended), httpx.AsyncClient() as client:
        opened = await client.post(f"{url}/episode", json={"episode_id": "e"})
        assert opened.status_code == 201
        assert "connection" not in opened.headers
        os.kill(os.getpid(), signal.SIGTERM)
        for step in range(8):
            await asyncio.sleep(0.05)
            acted = await client.post(f"{url}/act", json={"episode_id": "e", "observation": "x", "step": step})
            assert acted.status_code == 200, acted.text
            assert acted.headers["connection"] == "close"
        assert (await client.get(f"{url}/readyz")).status_code == 503
        await ended


async def test_calls_without_end_are_refused_in_the_end(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    async with draining(tmp_path, tokenizer, drain_delay_s=0.01, drain_s=0.5) as (url, ended):
        statuses = set[int]()
        async with httpx.AsyncClient() as client:
            os.kill(os.getpid(), signal.SIGTERM)
            while not ended.done():
                try:
                    statuses.add((await client.post(f"{url}/episode", json={})).status_code)
                except httpx.TransportError:
                    await asyncio.sleep(0.01)
    assert statuses >= {201}
    assert statuses <= {201, 503}
