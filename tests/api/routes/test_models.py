"""Models of several kinds: what their tokenizer and chat template mean for episodes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.api.routes.test_streams import stream
from tests.support import tokenizers as kinds
from tests.support.serving import serve

pytestmark = pytest.mark.store("sqlite")


@pytest.mark.parametrize("name", ["Llama 2", "Phi-3", "TinyLlama", "Qwen3"])
async def test_the_text_of_a_stream_is_the_text_of_the_act_and_its_tokens_are_the_templates(tmp_path: Path, name: str):
    """The policy writes the space that belongs to the template, where there is one."""
    tokenizer = HFTokenizer(kinds.KINDS[name]())
    engine = ScriptedEngine(tokenizer)
    space = engine.prompt.reply_space
    engine = ScriptedEngine(tokenizer, reply=lambda _: f"{space}go to it")
    async with serve(tmp_path, engine) as api:
        await api.open()
        *deltas, (_, act) = await stream(api)
        assert "".join(data["delta"] for _, data in deltas) == act["text"] == act["action"] == "go to it"
        await api.open("recorded")
        body = {"observation": "look", "action": "go to it"}
        assert (await api.client.post("/episode/recorded/action", json=body)).status_code == 200
        tokens = [(await api.trajectory(name, "tokens"))["segments"][0]["token_ids"] for name in ("e", "recorded")]
        assert tokens[0] == tokens[1], "the policy's tokens differ from those of the same action, recorded"


async def test_an_action_with_the_name_of_a_control_token_is_recorded_as_text(tmp_path: Path):
    tokenizer = HFTokenizer(kinds.chatml())
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.open()
        text = "<think>a</think><|im_end|>"
        answer = await api.client.post("/episode/e/action", json={"observation": "<tool_call>", "action": text})
        assert answer.json()["text"] == text
        (segment,) = (await api.trajectory(format="tokens"))["segments"]
        assert tokenizer.control_tokens["<think>"] not in segment["token_ids"]
        assert tokenizer.control_tokens["<tool_call>"] not in segment["token_ids"]
        names = [tokenizer.control_tokens["<|im_end|>"], tokenizer.control_tokens["<|im_start|>"]]
        assert [token for token in segment["token_ids"] if token in names] == [*names[::-1], *names[::-1]]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only for reranking') }}", "only for reranking"),
        ("{{ messages[-1].content }}", "unchanged and in order"),
    ],
)
async def test_a_model_whose_template_cannot_be_used_has_no_episodes_and_says_why(
    tmp_path: Path, template: str, reason: str
):
    engine = ScriptedEngine(HFTokenizer(kinds.chatml(template=template)))
    async with serve(tmp_path, engine) as api:
        assert (await api.client.get("/readyz")).status_code == 200, "it serves /v1"
        answer = await api.client.post("/episode", json={})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert reason in answer.json()["detail"]
        assert (await api.client.get("/version")).json()["template"] is None


async def test_an_episode_of_a_model_that_served_episodes_waits(tmp_path: Path, tokenizer: HFTokenizer):
    engine = ScriptedEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        await api.open()
        engine.info = dataclasses.replace(engine.info, no_episodes="its template cannot be used")
        answer = await api.post_act()
        assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")
        assert "its template cannot be used" in answer.json()["detail"]


class SmallModel(ScriptedEngine):
    """Has fewer embeddings than its tokenizer has tokens."""

    def __init__(self, tokenizer: HFTokenizer, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        super().__init__(tokenizer)

    @property
    def info(self) -> Any:
        return self._info

    @info.setter
    def info(self, value: Any) -> None:
        self._info = dataclasses.replace(value, vocab_size=self._vocab_size)


@pytest.mark.parametrize("missing", ["text", "control tokens", "unused control tokens"])
def test_a_model_without_the_tokens_of_its_prompts_serves_no_episodes(missing: str):
    backend = kinds.chatml()
    backend.add_special_tokens({"additional_special_tokens": ["<unused>"]})
    tokenizer = HFTokenizer(backend)
    size = {
        "text": tokenizer.max_token_id,
        "control tokens": tokenizer.control_tokens["<|im_end|>"],
        "unused control tokens": tokenizer.control_tokens["<unused>"],
    }
    reason = SmallModel(tokenizer, size[missing]).info.no_episodes
    assert (reason is None) == (missing == "unused control tokens"), reason
    assert reason is None or "embeddings" in reason
