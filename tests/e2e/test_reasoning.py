"""A reasoning model with its own think tags, and vLLM's reasoning parser.

Each thought ends with the model's closing tag, and the action after it satisfies the action space.
"""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import TAGS
from tests.e2e.server import Server
from tests.e2e.test_episodes import acted, opened

SPACES: list[Any] = [
    {"type": "discrete", "actions": ["left", "right"]},
    {
        "type": "json",
        "schema": {
            "type": "object",
            "properties": {"x": {"enum": [1, 2]}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
    {"type": "tools", "tools": [{"name": "wait"}]},
    {"type": "regex", "pattern": "go (up|down)"},
]


@pytest.fixture(scope="module")
def tags(thinker: Server) -> list[int]:
    """The ids of <think> and </think>."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(thinker.folder / "model").convert_tokens_to_ids(TAGS[:2])


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space["type"])
@pytest.mark.parametrize("reasoning", [None, {"max_tokens": 5}, {"max_tokens": 5, "history": "drop"}])
def test_thoughts_are_the_models_own_and_actions_are_held(
    thinker: Server, tags: list[int], space: Any, reasoning: Any
) -> None:
    with httpx.Client(base_url=thinker.url, timeout=120) as http:
        episode = opened(http, action_space=space, reasoning=reasoning, sampling={"seed": 3, "max_tokens": 64})
        for step in range(2):
            answer = acted(http, episode, f"row {step}", step=step)
            assert (answer["reasoning"] is None) == (reasoning is None)
            assert answer["parse_failure"] is None
            assert answer["action"] is not None
        segments = http.get(f"/episode/{episode}/trajectory?format=tokens").json()["segments"]
    ids = segments[-1]["token_ids"]
    assert [token for token in ids if token in tags][-2:] == tags, "every thought has both tags, even an empty one"


@pytest.mark.parametrize("streams", [False, True])
def test_constraints_of_completions_are_enforced_under_a_reasoning_parser(thinker: Server, streams: bool) -> None:
    with httpx.Client(base_url=f"{thinker.url}/v1", timeout=120) as http:
        model = http.get("/models").json()["data"][0]["id"]
        assert http.get(f"/models/{model}").json()["id"] == model
        wanted = {"structured_outputs": {"regex": "go (up|down)"}, "prompt": "row 0", "max_tokens": 32, "seed": 3}
        answer = http.post("/completions", json={"model": model, "stream": streams, **wanted})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if "choices" in line]
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    assert text in ("go up", "go down")
