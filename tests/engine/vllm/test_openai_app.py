"""The engine client of /v1: tenants do not share a prefix cache."""

from typing import Any

import pytest

from service.engine.base import CACHE_SALT, cache_salt
from service.engine.vllm.openai_app import SaltedClient


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
