"""Action spaces at the limits: they are refused or answered, and the acts of others go on meanwhile."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve, until

pytestmark = pytest.mark.store("sqlite")

SMALL = {"type": "discrete", "actions": ["left", "right"]}


def of_tokens(tokenizer: HFTokenizer, num_tokens: int) -> str:
    text = " left right up down" * num_tokens
    return tokenizer.decode(tokenizer.encode(text)[:num_tokens])


class PausedTokenizer:
    """Encodes texts that contain "paused" only after `resume` is set. `waiting` is set when one waits."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._tokenizer = tokenizer
        self.waiting, self.resume = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> list[int]:
        if "paused" in text:
            self.waiting.set()
            assert self.resume.wait(20), "the event loop was blocked"
        return self._tokenizer.encode(text)


async def test_acts_go_on_while_long_actions_are_encoded(tmp_path: Path, tokenizer: HFTokenizer):
    """When the episode is opened, and when an act narrows its actions."""
    paused: Any = PausedTokenizer(tokenizer)
    actions = [f"paused {number} " + "far away " * 100 for number in range(40)]

    async def while_encoding(api: Served, call: Any) -> httpx.Response:
        running = asyncio.create_task(call)
        await until(paused.waiting.is_set)
        assert (await api.act("calm"))["action"] in SMALL["actions"]
        assert not running.done()
        paused.resume.set()
        answer = await running
        paused.waiting.clear()
        paused.resume.clear()
        return answer

    async with serve(tmp_path, ScriptedEngine(paused)) as api:
        await api.open("calm", action_space=SMALL)
        body = {"episode_id": "e", "action_space": {"type": "discrete", "actions": actions}}
        assert (await while_encoding(api, api.client.post("/episode", json=body))).status_code == 201
        api.engine._encodings.clear()
        acted = await while_encoding(api, api.post_act("e", legal_actions=actions[1:]))
        assert acted.json()["action"] in actions[1:]


async def test_too_many_actions_are_refused(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        many = [f"go to {number}" for number in range(10_000)]
        opened = await api.client.post("/episode", json={"action_space": {"type": "discrete", "actions": many}})
        assert (opened.status_code, opened.json()["code"]) == (422, "invalid_request")
        await api.open("e", action_space=SMALL)
        for legal_actions in (many, ["left"] * 10_000, ["left", "right"] * 5_000, ["x" * 100_000]):
            acts = [{"episode_id": "e", "observation": "look", "legal_actions": legal_actions}]
            batch = (await api.client.post("/act/batch", json={"acts": acts})).json()["results"]
            for refused in ((await api.post_act("e", legal_actions=legal_actions)).json(), *batch):
                assert (refused["status"], refused["code"]) == (422, "invalid_request")
                assert "legal" in refused["detail"]
                assert len(refused["detail"]) < 300
        assert (await api.act("e"))["step"] == 0


async def test_actions_of_thousands_of_tokens_need_a_context_that_holds_them(tmp_path: Path, tokenizer: HFTokenizer):
    long = of_tokens(tokenizer, 2_000)
    space = {"type": "discrete", "actions": [f"{long} {way}" for way in ("left", "right")]}
    for max_model_len, status in ((4_096, 200), (1_024, 409)):
        async with serve(tmp_path / str(max_model_len), ScriptedEngine(tokenizer, max_model_len=max_model_len)) as api:
            await api.open("e", action_space=space)
            await api.open("small", action_space=SMALL)
            acted = await api.post_act("e")
            assert acted.status_code == status, acted.text
            if status == 200:
                assert acted.json()["action"] in space["actions"]
                assert acted.json()["usage"]["completion_tokens"] > 2_000
            else:
                assert acted.json()["code"] == "context_overflow"
            assert (await api.act("small"))["step"] == 0


async def test_a_long_common_prefix_costs_few_requests(tmp_path: Path, tokenizer: HFTokenizer):
    """The model decides only behind the prefix. Each request has the whole path to its branch."""
    prefix = of_tokens(tokenizer, 500)
    actions = [f"{prefix} {first} {second}" for first in range(32) for second in range(32)]
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        sampling = {"temperature": 1.0, "seed": 1}
        await api.open("e", action_space={"type": "discrete", "actions": actions}, sampling=sampling)
        acted = await api.act("e")
        assert acted["action"] in actions
        assert sum(acted["action_probs"].values()) <= 1 + 1e-9
        assert api.engine.num_calls <= 8
        num_path = min(map(len, api.engine.prompts)) - acted["usage"]["prompt_tokens"]
        assert num_path >= 500
