"""Ratings are safe to retry with an Idempotency-Key."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


async def test_a_rating_with_the_same_key_is_stored_once(api: Served):
    await api.open()
    await api.open("other")
    path, key = f"{api.path}/feedback", {"Idempotency-Key": "k"}
    first = await api.client.post(path, json={"rating": 4}, headers=key)
    again = await api.client.post(path, json={"rating": 4}, headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert first.json().keys() == {"episode_id", "step", "rating", "comment", "rater", "created_at"}
    changed = await api.client.post(path, json={"rating": 5}, headers=key)
    assert (changed.status_code, changed.json()["code"]) == (409, "idempotency_mismatch")
    assert (await api.client.post("/episode/other/feedback", json={"rating": 5}, headers=key)).status_code == 201
    assert (await api.client.post(path, json={"rating": 4}, headers={"Idempotency-Key": "l"})).status_code == 201
    assert [one["rating"] for one in (await api.trajectory())["feedback"]] == [4, 4]
