"""Streams, thoughts, tools, forks and exact exports on the real engine."""

import json
import math
import subprocess
import uuid
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server, until
from tests.e2e.test_episodes import acted, opened

DISCRETE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}
BLOCK = 32
"""Tokens in a block of the prefix cache on the CPU."""


@pytest.fixture
def http(server: Server) -> Any:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def metric(http: httpx.Client, name: str) -> float:
    """Returns the sum of the metric's series."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_streamed_tokens_are_those_of_the_act(http: httpx.Client) -> None:
    # Long, because pieces are joined if the server is slower than its engine.
    space = {"type": "regex", "pattern": "[a-z]{400}"}
    episode = opened(http, action_space=space, sampling={"seed": 5, "max_tokens": 500})
    body = {"episode_id": episode, "observation": "spell", "step": 0}
    with http.stream("POST", "/act", json=body, headers={"Accept": "text/event-stream"}) as answer:
        lines = list(answer.iter_lines())
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert len(kinds) > 3, "the text arrives in several pieces"
    assert kinds == ["text"] * (len(kinds) - 1) + ["act"]
    assert "".join(item["delta"] for item in data[:-1]) == data[-1]["text"] == data[-1]["action"]
    twin = opened(http, action_space=space, sampling={"seed": 5, "max_tokens": 500})
    assert acted(http, twin, "spell")["text"] == data[-1]["text"], "a stream and a plain act draw the same text"


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_caller_that_leaves_frees_the_engine(http: httpx.Client, server: Server, accept: str) -> None:
    endless = {"type": "regex", "pattern": "[0-9]{4000}"}
    episode = opened(http, action_space=endless, sampling={"max_tokens": 4000})
    body = {"episode_id": episode, "observation": "spell"}
    command = ["curl", "-sN", "-H", f"Accept: {accept}", "-d", json.dumps(body), f"{server.url}/act"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        if accept == "text/event-stream":
            assert caller.stdout.readline() == b"event: text\n"
        else:
            until(lambda: metric(http, "agent_active_acts") == 1)
        assert caller.poll() is None, "the act goes on"
        caller.kill()
    until(lambda: metric(http, "agent_active_acts") == 0)
    assert http.get(f"/episode/{episode}").json()["step"] == 0


@pytest.mark.parametrize("history", ["keep", "drop"])
def test_the_policy_thinks_within_its_budget(http: httpx.Client, history: str) -> None:
    reasoning = {"max_tokens": 6, "history": history}
    episode = opened(http, action_space=DISCRETE, reasoning=reasoning, sampling={"seed": 2})
    for step in range(4):
        answer = acted(http, episode, f"row {step}, column 0", step=step)
        assert answer["action"] in DISCRETE["actions"]
        assert answer["reasoning"] is not None
    segments = http.get(f"/episode/{episode}/trajectory?format=tokens").json()["segments"]
    assert len(segments) == (1 if history == "keep" else 4)


def test_a_tool_call_is_valid_under_its_tools_schema(http: httpx.Client) -> None:
    parameters = {"type": "object", "properties": {"to": {"enum": ["door", "window"]}}, "required": ["to"]}
    tools = [{"name": "move", "parameters": parameters}, {"name": "wait"}]
    names: set[str] = set()
    for seed in range(8):
        episode = opened(
            http, action_space={"type": "tools", "tools": tools}, sampling={"max_tokens": 200, "seed": seed}
        )
        for result in ("Where to?", {"result": "closed"}):
            answer = acted(http, episode, result)
            if answer["finish_reason"] == "length":
                continue
            assert answer["parse_failure"] is None
            names.add(answer["action"]["name"])
            if answer["action"]["name"] == "move":
                assert answer["action"]["arguments"]["to"] in ("door", "window")
    assert names


def test_forks_reuse_the_prefix_that_their_parent_left(http: httpx.Client) -> None:
    episode = opened(http, action_space=DISCRETE, instructions="Walk.")
    for step in range(100):
        acted(http, episode, f"row {step}, column 3: a long corridor", step=step)
    for at_step in (None, 60):
        forked = http.post(f"/episode/{episode}/fork", json={"n": 64, "at_step": at_step})
        assert forked.status_code == 201
        names = [fork["episode_id"] for fork in forked.json()["episodes"]]
        acts = [{"episode_id": name, "observation": "which way?", "step": at_step or 100} for name in names]
        for result in http.post("/act/batch", json={"acts": acts}).json()["results"]:
            usage = result["usage"]
            cachable = (usage["prompt_tokens"] - 1) // BLOCK * BLOCK
            assert usage["cached_tokens"] >= 0.95 * cachable


def test_exported_tokens_score_again_through_the_engine(http: httpx.Client) -> None:
    """Exported logprobs equal those that /v1 computes for the exported tokens.

    Free text is compared with prompt logprobs at temperature 1, discrete actions with the logprobs of the legal tokens.
    """
    group = uuid.uuid4().hex
    text = opened(http, group=group, sampling={"max_tokens": 24, "seed": 1, "temperature": 1.0})
    walk = opened(http, group=group, action_space=DISCRETE, sampling={"seed": 4})
    for step in range(3):
        for episode in (text, walk):
            acted(http, episode, f"row {step}, column {step}", step=step)
    for episode in (text, walk):
        http.post(f"/episode/{episode}/end", json={"terminated": True})
    lines = http.get("/export", params={"format": "tokens", "group": group}).text.splitlines()
    exported = {line["episode"]["episode_id"]: line["segments"][0] for line in map(json.loads, lines)}
    policy = http.get("/version").json()["policy"]

    segment = exported[text]
    body = {"model": policy, "prompt": segment["token_ids"], "max_tokens": 1, "prompt_logprobs": 0}
    scored = http.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    for place, mask in enumerate(segment["loss_mask"]):
        if mask:
            again = scored[place][str(segment["token_ids"][place])]["logprob"]
            assert math.isclose(again, segment["logprobs"][place], abs_tol=2e-2), place

    segment, legal = exported[walk], _first_tokens(http, DISCRETE["actions"])
    for place, mask in enumerate(segment["loss_mask"]):
        if mask:
            body = {
                "model": policy,
                "prompt": segment["token_ids"][:place],
                "max_tokens": 1,
                "temperature": 1.0,
                "allowed_token_ids": legal,
                "logprobs": 4,
                "return_tokens_as_token_ids": True,
            }
            choice = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["top_logprobs"][0]
            again = choice[f"token_id:{segment['token_ids'][place]}"]
            assert math.isclose(again, segment["logprobs"][place], abs_tol=2e-2), place


def _first_tokens(http: httpx.Client, actions: list[str]) -> list[int]:
    """Returns the first token of each action."""
    policy = http.get("/version").json()["policy"]
    return [
        http.post("/tokenize", json={"model": policy, "prompt": action, "add_special_tokens": False}).json()["tokens"][
            0
        ]
        for action in actions
    ]
