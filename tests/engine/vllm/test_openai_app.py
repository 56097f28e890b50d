"""The engine client of /v1: tenants do not share a prefix cache, and each request to the model waits for a slot."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from service.engine.base import CACHE_SALT, SLOT, cache_salt
from service.engine.vllm.openai_app import CheckedClient, SaltedClient


class Recorder:
    """Replaces vLLM's engine, and records the prompts that it receives."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.model_config = "the engine's own"

    def generate(self, prompt: Any, *_: Any, **__: Any) -> str:
        self.prompts.append(prompt)
        return "generated"

    def encode(self, prompt: Any, *_: Any, **__: Any) -> str:
        self.prompts.append(prompt)
        return "encoded"


@pytest.mark.parametrize("named", [{}, {"cache_salt": "theirs"}], ids=["none", "theirs"])
def test_a_requests_salt_goes_before_what_its_caller_names(named: dict[str, str]):
    recorder = Recorder()
    client = SaltedClient(recorder)
    for tenant in ("acme", "other", "default"):
        token = CACHE_SALT.set(cache_salt(tenant))
        assert client.generate({"prompt_token_ids": [1], **named}, None, "id") == "generated"
        assert client.encode({"prompt_token_ids": [1], **named}, None, "id") == "encoded"
        CACHE_SALT.reset(token)
    salts = [prompt.get("cache_salt") for prompt in recorder.prompts]
    assert len(set(salts)) == 3
    assert salts[0] == salts[1] == ":".join([str(cache_salt("acme")), *named.values()])
    assert salts[4] == salts[5] == named.get("cache_salt")


def test_all_else_is_the_engines_own():
    assert SaltedClient(Recorder()).model_config == "the engine's own"


class Drawing:
    """Replaces vLLM's engine: each request has two outputs, or only the last one. Counts the slots in use."""

    def __init__(self) -> None:
        self.num_running = self.most_running = 0
        self.slots = asyncio.Semaphore()

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        async with self.slots:
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
            yield
            self.num_running -= 1

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any]:
        assert params.n == 1
        assert self.num_running
        for is_last in (False, True):
            await asyncio.sleep(0)
            if is_last or params.output_kind != RequestOutputKind.FINAL_ONLY:
                choice = SimpleNamespace(index=0, text=str(params.seed))
                yield SimpleNamespace(request_id=request_id, finished=is_last, outputs=[choice])

    model_config = SimpleNamespace(get_vocab_size=lambda: 9)


@pytest.mark.parametrize("num_slots", [1, 2, 9])
@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA])
async def test_each_choice_of_a_request_waits_for_a_slot(kind: RequestOutputKind, num_slots: int):
    engine = Drawing()
    engine.slots = asyncio.Semaphore(num_slots)
    token = SLOT.set(engine.slot)
    params = SamplingParams(n=5, seed=7, output_kind=kind)
    client: Any = CheckedClient(engine, check=None)  # pyright: ignore[reportArgumentType]
    found = [output async for output in client.generate({"prompt_token_ids": [1]}, params, "id")]
    SLOT.reset(token)
    assert engine.most_running == min(num_slots, 5)
    assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]
    assert {output.request_id for output in found} == {"id"}
    if kind == RequestOutputKind.FINAL_ONLY:
        assert [(choice.index, choice.text) for choice in found[0].outputs] == [(i, str(7 + i)) for i in range(5)]
    else:
        counts = Counter((output.outputs[0].index, output.outputs[0].text) for output in found)
        assert counts == {(index, str(7 + index)): 2 for index in range(5)}
