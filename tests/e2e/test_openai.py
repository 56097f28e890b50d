"""/v1 on the same engine as the episodes, called with the official OpenAI client."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import ANY

import httpx
import jsonschema
import openai
import pytest

from tests.e2e.server import Server
from tests.e2e.test_episodes import acted, opened

MODEL = "toy-text"
SAY: Any = [{"role": "user", "content": "row 0, column 0"}]


@pytest.fixture
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def http(server: Server) -> Any:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=SAY, max_tokens=8, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)  # type: ignore[union-attr,arg-type]
    assert answer.choices[0].model_extra["token_ids"]  # type: ignore[index]


def test_chat_stream(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=8, temperature=0)
    chunks = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=8, temperature=0, stream=True)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == plain.choices[0].message.content


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"move": {"enum": ["left", "right"]}},
        "required": ["move"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "move", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=64, response_format=form)
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_tools(client: openai.OpenAI, http: httpx.Client) -> None:
    # The policy would fill the JSON with blanks until max_tokens.
    blank = {"model": MODEL, "prompt": "\n", "add_special_tokens": False}
    no_blanks = {str(token): -100 for token in http.post("/tokenize", json=blank).json()["tokens"]}
    parameters = {"type": "object", "properties": {"to": {"enum": ["door", "window"]}}, "required": ["to"]}
    tools: Any = [{"type": "function", "function": {"name": "move", "parameters": parameters, "strict": True}}]
    choice: Any = {"type": "function", "function": {"name": "move"}}
    answer = client.chat.completions.create(
        model=MODEL, messages=SAY, max_tokens=200, temperature=0, tools=tools, tool_choice=choice, logit_bias=no_blanks
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "move"
    assert json.loads(call.function.arguments)["to"] in ("door", "window")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "move"}}])
def test_a_stream_of_a_tool_call_has_every_token(http: httpx.Client, choice: Any) -> None:
    parameters = {"type": "object", "properties": {"to": {"enum": ["door", "window"]}}, "required": ["to"]}
    body = {
        "model": MODEL,
        "messages": SAY,
        "max_tokens": 40,
        "tools": [{"type": "function", "function": {"name": "move", "parameters": parameters}}],
        "tool_choice": choice,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    num_token_ids = sum(len(choice.get("token_ids") or ()) for chunk in chunks for choice in chunk["choices"])
    assert num_token_ids == chunks[-1]["usage"]["completion_tokens"] > 0


def test_completions_of_token_ids_and_a_stream(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=[0, 3, 20], max_tokens=6, temperature=0, logprobs=0)
    assert plain.choices[0].logprobs is not None
    chunks = client.completions.create(model=MODEL, prompt=[0, 3, 20], max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="row 0, column 0", max_output_tokens=16, store=False)
    assert answer.status in ("completed", "incomplete")


def test_models_and_tokens(client: openai.OpenAI, http: httpx.Client) -> None:
    (listed,) = client.models.list()
    assert listed.id == MODEL
    assert client.models.retrieve(MODEL).model_dump(exclude={"permission"}) == listed.model_dump(exclude={"permission"})
    with pytest.raises(openai.NotFoundError, match="There is no model 'nobody'"):
        client.models.retrieve("nobody")
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": "row 1", "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"] == "row 1"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=SAY)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=SAY, temperature=-1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[1] * 50_000, max_tokens=5)
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=MODEL, prompt="x" * (5 << 20))
    assert large.value.status_code == 413
    for path, kind in (("/none", openai.NotFoundError), ("/models", openai.APIStatusError)):
        with pytest.raises(kind) as refused:
            client.post(path, cast_to=httpx.Response)
        assert refused.value.body == {"message": ANY, "type": ANY, "param": None, "code": refused.value.status_code}


WIDE = {"type": "object", "properties": {f"property{number}": {"type": "string"} for number in range(60_000)}}


@pytest.mark.parametrize(
    "wanted",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": WIDE}}},
        {"structured_outputs": {"json": WIDE}},
        {"structured_outputs": {"regex": "("}},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": WIDE, "strict": True}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
    ],
    ids=["response_format", "structured_outputs", "regex", "tools"],
)
def test_invalid_grammar_is_refused(http: httpx.Client, wanted: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": SAY, "max_tokens": 4, **wanted}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text[:300]
    assert http.get("/readyz").status_code == 200


@pytest.mark.parametrize("value", ["[" * 50_000, "[" * 400 + "]" * 400, "9" * 10_000])
def test_deep_json_and_large_numbers_are_refused(http: httpx.Client, value: str) -> None:
    body = f'{{"model":"{MODEL}","messages":[{{"role":"user","content":{value}}}]}}'
    answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_json")


def test_media_urls_are_refused_by_default(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [image]}])  # type: ignore[list-item,misc]


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache", "/collective_rpc", "/sleep"),
        *(
            "/shutdown",
            "/invocations",
            "/start_profile",
            "/server_info",
            "/load",
            "/scale_elastic_ep",
            "/tokenizer_info",
        ),
    ],
)
def test_engine_control_routes_return_404(http: httpx.Client, path: str) -> None:
    for method in ("GET", "POST"):
        assert http.request(method, path, json={}).status_code in (404, 405), path


def test_chats_and_episodes_share_the_engine(client: openai.OpenAI, http: httpx.Client) -> None:
    episode = opened(http, action_space={"type": "discrete", "actions": ["left", "right"]})

    def chat(_: int) -> str:
        return client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=16).choices[0].finish_reason

    with ThreadPoolExecutor(4) as threads:
        chats = threads.map(chat, range(8))
        for step in range(8):
            acted(http, episode, f"row {step}", step=step)
        assert set(chats) <= {"stop", "length"}


def test_a_client_that_leaves_frees_the_engine(http: httpx.Client, server: Server) -> None:
    body = {"model": MODEL, "prompt": [0, 3], "max_tokens": 8000, "min_tokens": 8000, "ignore_eos": True}
    command = ["curl", "-s", "--max-time", "0.7", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    left = subprocess.run([*command, f"{server.url}/v1/completions"], capture_output=True, timeout=60)
    assert left.returncode == 28, left.stdout
    episode, running, step = opened(http, action_space={"type": "discrete", "actions": ["left", "right"]}), 1.0, 0
    while running and step < 100:  # an act makes the engine update the number of running requests
        acted(http, episode, "row 0", step=step)
        lines = http.get("/metrics").text.splitlines()
        running = next(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))
        step += 1
    assert not running
