"""Answers that may be large are made in a thread: the event loop goes on with acts."""

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.api.http import serialization
from service.api.routes import episodes, export
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


async def test_trajectories_lists_and_exports_are_formatted_in_a_thread(api: Served, monkeypatch: pytest.MonkeyPatch):
    await api.open()
    await api.act()
    await api.act(observation=None, terminated=True)
    threads: set[int] = set()

    def observed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            threads.add(threading.get_ident())
            return function(*args)

        return call

    monkeypatch.setattr(serialization, "document", observed(serialization.document))
    monkeypatch.setattr(export, "document", observed(export.document))
    monkeypatch.setattr(episodes, "resource", observed(episodes.resource))
    for path in (f"{api.path}/trajectory", "/export", "/episode"):
        threads.clear()
        answer = await api.client.get(path)
        assert answer.status_code == 200, answer.text
        assert threads, path
        assert threading.get_ident() not in threads, path
