"""/v1 without an engine that serves it: errors in OpenAI's format, and the limits on bodies."""

from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from service.engine.vllm.openai_app import InferenceOptionError, check_options
from service.lifecycle import Phase
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}


class EchoEngine(ScriptedEngine):
    """An engine whose /v1 reads the whole body and returns its length."""

    async def openai_app(self) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            length, more = 0, True
            while more:
                message = await receive()
                length, more = length + len(message["body"]), message["more_body"]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": str(length).encode()})

        return app


async def _refused(api: Served, status: int, code: str) -> None:
    answer = await api.client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_an_engine_without_it_says_so(tmp_path: Path, tokenizer: HFTokenizer):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await _refused(api, 501, "not_implemented")
        api.app.state.services.lifecycle.enter(Phase.DRAINING)
        await _refused(api, 503, "draining")


async def test_a_loading_service_says_so(tmp_path: Path):
    async with serve(tmp_path, None, loading=True) as api:
        await _refused(api, 503, "loading")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_refused(tmp_path: Path, tokenizer: HFTokenizer, chunked: bool):
    async def chunks(size: int) -> Any:
        for _ in range(size // 512):
            yield b"x" * 512

    async with serve(tmp_path, EchoEngine(tokenizer), max_body_bytes=4096) as api:
        for size, status in ((4096, 200), (8192, 413)):
            content: Any = chunks(size) if chunked else b"x" * size
            headers = {"Content-Type": "multipart/form-data"}
            answer = await api.client.post("/v1/audio/transcriptions", content=content, headers=headers)
            assert answer.status_code == status
        assert answer.json()["error"]["code"] == "payload_too_large"


async def test_a_model_that_does_not_generate_has_no_episodes(tmp_path: Path, tokenizer: HFTokenizer):
    import dataclasses

    engine = EchoEngine(tokenizer)
    engine.info = dataclasses.replace(engine.info, no_episodes="it cannot generate text")
    async with serve(tmp_path, engine) as api:
        answer = await api.client.post("/episode", json={})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert "cannot generate text" in answer.json()["detail"]
        assert (await api.client.get("/version")).json()["template"] is None
        assert (await api.client.post("/v1/embeddings", json={})).status_code == 200


def test_an_option_that_is_not_there_is_refused():
    with pytest.raises(InferenceOptionError, match="did you mean 'tool_call_parser'"):
        check_options({"tool_cal_parser": "hermes"})
    with pytest.raises(InferenceOptionError):
        check_options({"api_key": "x"})
    check_options({"tool_call_parser": "hermes", "chat_template": "x"})
