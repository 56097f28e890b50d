"""Adapters that are uploaded: what they become, how large they may be, and what a failed upload leaves behind."""

import asyncio
import dataclasses
import io
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.adapters import make_adapter
from tests.support.serving import DISCRETE, Served, serve, until

TAR = {"Content-Type": "application/x-tar"}
LIMIT = 1 << 20


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    engine = ScriptedEngine(tokenizer)
    engine.info = dataclasses.replace(engine.info, max_lora_rank=8)
    async with serve(tmp_path / "data", engine, max_adapter_bytes=LIMIT, receive_limit_s=1.0) as served:
        yield served


def archive(folder: Path, *names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names or ("adapter_config.json", "adapter_model.safetensors"):
            tar.add(folder / name, name)
    return buffer.getvalue()


async def put(api: Served, content: Any, query: str = "", headers: Any = TAR) -> httpx.Response:
    return await api.client.put(f"/policy/walker{query}", content=content, headers=headers)


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "data" / "adapters").glob("*") if len(path.name) != 64]


async def test_an_uploaded_adapter_is_a_version_like_any_other(api: Served, tmp_path: Path):
    first = await put(api, archive(make_adapter(tmp_path / "one", 1)))
    assert (first.status_code, first.json()["current"]) == (201, True)
    second = await put(
        api, archive(make_adapter(tmp_path / "two", 2)), f"?alias=false&round=7&parent={first.json()['version']}"
    )
    shown = second.json()
    assert (second.status_code, shown["current"], shown["round"]) == (201, False, 7)
    assert shown["parent"] == first.json()["version"]
    await api.open(policy=shown["version"], action_space=DISCRETE)
    assert (await api.act())["policy_version"] == shown["policy_version"]
    again = await put(api, archive(tmp_path / "two"))
    assert (again.status_code, again.json()["digest"], again.json()["current"]) == (200, shown["digest"], True)
    assert left_behind(tmp_path) == []


async def test_a_bad_upload_is_refused_and_leaves_nothing_behind(api: Served, tmp_path: Path):
    good = archive(make_adapter(tmp_path / "one", 1))
    nan = make_adapter(tmp_path / "nan", 2)
    tensors = load_file(nan / "adapter_model.safetensors")
    next(iter(tensors.values()))[1, 2] = np.nan
    save_file(tensors, nan / "adapter_model.safetensors")
    for content, word in (
        (good[: len(good) // 2], "tar archive"),
        (b"", "tar archive"),
        (archive(tmp_path / "one", "adapter_config.json"), "no adapter_model.safetensors"),
        (archive(make_adapter(tmp_path / "high", 1, rank=16)), "rank"),
        (archive(nan), "NaN or infinity"),
    ):
        refused = await put(api, content)
        assert (refused.status_code, word in refused.json()["detail"]) == (422, True), refused.text
        assert str(tmp_path) not in refused.text
    for query in ("?alias=maybe", "?round=-1", "?parent=walker", "?evaluation=1"):
        assert (await put(api, good, query)).status_code == 422, query
    assert (await put(api, b'{"path": "one"}', "?alias=false", {})).status_code == 422
    compressed = await put(api, good, headers={**TAR, "Content-Encoding": "gzip"})
    assert compressed.status_code == 400
    base = await api.client.put("/policy/scripted", content=good, headers=TAR)
    assert (base.status_code, "base model" in base.json()["detail"]) == (422, True)
    assert left_behind(tmp_path) == []
    assert (await api.client.get("/policy")).json()["versions"] == []


async def chunks(content: bytes, size: int = 4096) -> AsyncGenerator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def begun(api: Served, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends the first half of an upload."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"PUT /policy/walker HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/x-tar\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[: len(content) // 2])
    await writer.drain()
    return reader, writer


async def test_an_upload_over_the_limit_is_refused(api: Served, tmp_path: Path):
    large = archive(make_adapter(tmp_path / "one", 1)) + b"\0" * LIMIT
    for content in (large, chunks(large)):  # with and without a Content-Length
        refused = await put(api, content)
        assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")
        assert refused.json()["max_body_bytes"] == LIMIT
    assert left_behind(tmp_path) == []


async def test_an_upload_that_stops_leaves_nothing_behind(api: Served, tmp_path: Path):
    content = archive(make_adapter(tmp_path / "one", 1))
    reader, slow = await begun(api, content)
    assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
    slow.close()
    _, gone = await begun(api, content)
    await until(lambda: left_behind(tmp_path))
    gone.close()
    await until(lambda: not left_behind(tmp_path))
    assert (await put(api, content)).status_code == 201


async def test_an_engine_without_adapters_takes_no_upload(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        refused = await put(api, archive(make_adapter(tmp_path / "one", 1)))
        assert (refused.status_code, "EPISODIC_ADAPTERS" in refused.json()["detail"]) == (422, True)
