"""A client that reads its stream slowly, or not at all, blocks no other client."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve, until

LONG = " ".join(f"word-{number}" for number in range(200))


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    engine = ScriptedEngine(tokenizer, reply=lambda _: LONG)
    async with serve(tmp_path, engine, receive_limit_s=1.0) as served:
        yield served


async def raw_stream(api: Served, episode_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends an act over a new connection and asks for a stream, but reads nothing."""
    host, _, port = api.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=256)
    body = json.dumps({"episode_id": episode_id, "observation": "look", "step": 0})
    head = "POST /act HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    await writer.drain()
    return reader, writer


async def test_a_reader_that_pauses_gets_the_whole_stream_and_the_act(api: Served):
    await api.open(sampling={"max_tokens": 2000})
    body = {"episode_id": "e", "observation": "look", "step": 0}
    text, kinds = "", []
    async with api.client.stream("POST", "/act", json=body, headers={"Accept": "text/event-stream"}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
            elif line.startswith("data: ") and kinds[-1] == "text":
                text += json.loads(line.removeprefix("data: "))["delta"]
                await asyncio.sleep(0.001)
    assert text == LONG
    assert kinds[-1] == "act"


async def test_others_act_while_a_caller_reads_nothing(api: Served):
    await api.open("slow", sampling={"max_tokens": 2000})
    await api.open("other")
    _, writer = await raw_stream(api, "slow")
    for step in range(5):
        assert (await api.act("other", step=step))["step"] == step
    writer.close()


async def test_a_caller_that_leaves_its_stream_unread_leaves_nothing_in_flight(api: Served):
    await api.open(sampling={"max_tokens": 2000})
    reader, writer = await raw_stream(api, "e")
    await reader.read(64)
    writer.transport.abort()
    cache = api.app.state.services.sessions._cache
    await until(lambda: cache.peek("e").in_flight is None)
    assert api.app.state.services.admission._num_acts == 0
