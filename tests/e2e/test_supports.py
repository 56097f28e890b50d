"""Exported tokens score again: transformers in float32 gives each log-probability that a support promises."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.server import Server
from tests.e2e.test_episodes import acted, opened
from tests.e2e.test_readme import TRAINING, blocks

TURNS = {"type": "discrete", "actions": ["left", "down", "right", "up"]}
ROOMS = {"type": "discrete", "actions": ["go", *(f"go to room {number}" for number in range(12)), "wait for the night"]}
TAKEN = {**ROOMS, "probs": "taken"}
MANY = {"type": "discrete", "actions": [f"take item {number}" for number in range(100)]}
WORDS = {"type": "regex", "pattern": "[a-z ]{1,8}"}
CASES: dict[str, tuple[set[str], dict[str, Any], Any, Any]] = {
    **{f"discrete, temperature {value}": ({"ids"}, {"temperature": value}, TURNS, None) for value in (0, 0.5, 1, 2)},
    "actions of several tokens": ({"ids"}, {"temperature": 1.5}, ROOMS, None),
    "only the action's path is scored": ({"ids"}, {"temperature": 0.5}, TAKEN, None),
    "only the likeliest paths are scored": ({"ids"}, {"temperature": 0}, TAKEN, None),
    "more than 64 actions": ({"ids"}, {}, MANY, None),
    "filters among first tokens": ({"ids"}, {"temperature": 1.5, "top_k": 2}, TURNS, None),
    "filters among several tokens": ({"filtered"}, {"temperature": 1.5, "top_k": 3}, ROOMS, None),
    "text": ({"all"}, {"temperature": 0.7}, {"type": "text"}, None),
    "text, temperature 0 under filters": (
        {"all"},
        {"temperature": 0, "top_p": 0.5, "top_k": 2},
        {"type": "text"},
        None,
    ),
    "text under a filter": ({"filtered"}, {"top_k": 3}, {"type": "text"}, None),
    "text of a temperature that the engine raises": ({"filtered"}, {"temperature": 1e-3}, {"type": "text"}, None),
    "text under a grammar": ({"filtered"}, {"temperature": 0.7}, WORDS, None),
    "a thought before an action": ({"all", "ids"}, {"temperature": 0.7}, TURNS, "keep"),
    "a thought that is dropped": ({"all", "ids"}, {"temperature": 0.7}, TURNS, "drop"),
    "a thought before a text": ({"all"}, {}, {"type": "text"}, "keep"),
}


@pytest.fixture(scope="module")
def http(thinker: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=thinker.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(thinker: Server) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(thinker.folder / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def logprob() -> Any:
    """The function that docs/training.md shows."""
    (code,) = [block for block in blocks(TRAINING, "python") if "def logprob" in block]
    found: dict[str, Any] = {}
    exec(code, found)  # noqa: S102 - it is ours
    return found["logprob"]


def scored_again(http: httpx.Client, episode: str, model: Any, logprob: Any) -> set[str]:
    """Compares the log-probabilities of the exported tokens. Returns the kinds of their supports."""
    kinds: set[str] = set()
    for segment in http.get(f"/episode/{episode}/trajectory?format=tokens").json()["segments"]:
        with torch.inference_mode():
            logits = model(torch.tensor([segment["token_ids"]])).logits[0]
        for place, support in enumerate(segment["support"]):
            if support is None:
                continue
            kinds.add(support["kind"])
            if support["kind"] != "filtered":
                again = float(logprob(logits[place - 1], segment["token_ids"][place], support, segment["temperature"]))
                assert again == pytest.approx(segment["logprobs"][place], abs=1e-3), (place, support)
    return kinds


@pytest.mark.parametrize("case", CASES)
def test_the_stored_logprobs_are_those_of_the_supports(http: httpx.Client, model: Any, logprob: Any, case: str) -> None:
    kinds, sampling, space, history = CASES[case]
    reasoning = history and {"max_tokens": 6, "history": history}
    episode = opened(http, action_space=space, reasoning=reasoning, sampling={"max_tokens": 12, "seed": 7, **sampling})
    for step in range(3):
        narrowed = {"legal_actions": space["actions"][1::2]} if "actions" in space and step == 1 else {}
        acted(http, episode, f"row {step}, column 3", step=step, **narrowed)
    assert scored_again(http, episode, model, logprob) == kinds


def test_a_fork_scores_again_behind_a_recorded_action(http: httpx.Client, model: Any, logprob: Any) -> None:
    sampling = {"temperature": 1.5, "seed": 3}
    episode = opened(http, action_space=ROOMS, reasoning={"max_tokens": 6}, sampling=sampling)
    acted(http, episode, "row 0", step=0)
    body = {"observation": "row 1", "action": "go to room 3", "step": 1}
    assert http.post(f"/episode/{episode}/action", json=body).status_code == 200
    forks = http.post(f"/episode/{episode}/fork", json={"n": 2}).json()["episodes"]
    for name in (episode, *(fork["episode_id"] for fork in forks)):
        acted(http, name, "row 2", step=2)
        assert scored_again(http, name, model, logprob) == {"all", "ids"}
