"""The rate limit `calls_per_s` for single acts and batches, down to less than one call per second."""

from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve

pytestmark = pytest.mark.store("sqlite")
"""The rate limit does not use the store."""


async def opened(api: Served, *names: str, now: list[float]) -> None:
    """Opens episodes with long pauses between them, so that the next call has the whole rate limit available."""
    for name in names:
        await api.open(name)
        now[0] += 100.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of admission, which a test moves."""
    moment = [1000.0]
    monkeypatch.setattr("service.access.admission.time", SimpleNamespace(monotonic=lambda: moment[0]))
    return moment


async def batch(api: Served, *names: str) -> httpx.Response:
    acts = [{"episode_id": name, "observation": "look"} for name in names]
    return await api.client.post("/act/batch", json={"acts": acts})


async def test_rate_limited_call_gets_retry_after(tmp_path: Path, tokenizer: HFTokenizer, now: list[float]):
    async with serve(tmp_path, ScriptedEngine(tokenizer), quota={"calls_per_s": 0.1}) as api:
        await opened(api, "a", now=now)
        assert (await api.post_act("a")).status_code == 200
        refused = await api.post_act("a")
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        now[0] += float(refused.headers["retry-after"])
        assert (await api.post_act("a")).status_code == 200


async def test_large_batch_delays_the_next_call(tmp_path: Path, tokenizer: HFTokenizer, now: list[float]):
    async with serve(tmp_path, ScriptedEngine(tokenizer), quota={"calls_per_s": 4}) as api:
        names = [f"e{number}" for number in range(8)]
        await opened(api, *names, now=now)
        assert (await batch(api, *names)).status_code == 200
        refused = await batch(api, *names)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        now[0] += float(refused.headers["retry-after"])
        assert (await batch(api, *names)).status_code == 200


async def test_a_batch_succeeds_at_a_low_rate(tmp_path: Path, tokenizer: HFTokenizer, now: list[float]):
    async with serve(tmp_path, ScriptedEngine(tokenizer), quota={"calls_per_s": 1}) as api:
        await opened(api, "a", "b", now=now)
        assert (await batch(api, "a", "b")).status_code == 200
