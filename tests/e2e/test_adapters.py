"""LoRA adapters on the real engine: versions side by side, replacement without stale prefixes, rejection, restart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from service.cli.main import app
from tests.e2e.server import Server
from tests.e2e.test_episodes import acted, opened
from tests.support.adapters import make_adapter

DISCRETE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}
LONG = "Walk on. " * 40
NUM_EXTRA = 5


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("one", "two"), start=1):
        make_adapter(folder / "in" / name, seed)
    for number in range(NUM_EXTRA):
        make_adapter(folder / "in" / f"extra-{number}", 10 + number)
    make_adapter(folder / "in" / "output", 3, modules=("lm_head",))
    make_adapter(folder / "in" / "high", 1, rank=64)
    make_adapter(folder / "in" / "other-model", 1, num_in=48)
    started = Server(folder, adapters=str(folder / "in")).start()
    yield started
    if started.process is not None and started.process.poll() is None:
        started.kill()


def probs(http: httpx.Client, policy: str) -> dict[str, float]:
    """Returns the action probabilities after a prompt of several cache blocks, the same for all policies."""
    episode = opened(http, policy=policy, action_space=DISCRETE, instructions=LONG, sampling={"temperature": 0})
    acted(http, episode, "row 0, column 0", step=0)
    return acted(http, episode, "row 1, column 0", step=1)["action_probs"]


def near(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(abs(one[name] - other[name]) < 1e-2 for name in one)


def load(http: httpx.Client, path: str) -> Any:
    return http.put("/policy/walker", json={"path": path})


def test_two_versions_act_side_by_side_in_one_batch(lora: Server) -> None:
    with httpx.Client(base_url=lora.url, timeout=120) as http:
        one = http.put("/policy/side", json={"path": "one"}).json()
        two = http.put("/policy/side", json={"path": "two", "alias": False, "parent": one["version"]}).json()
        alone = {one["policy_version"]: probs(http, "side"), two["policy_version"]: probs(http, two["version"])}
        assert not near(*alone.values())
        for number in range(NUM_EXTRA):  # more than the engine has in one batch, so that it evicts both versions
            probs(http, http.put(f"/policy/extra-{number}", json={"path": f"extra-{number}"}).json()["version"])
        policies = ["side", two["version"]] * 8
        episodes = [
            opened(http, policy=policy, action_space=DISCRETE, instructions=LONG, sampling={"temperature": 0})
            for policy in policies
        ]
        for step, row in enumerate(("row 0, column 0", "row 1, column 0")):
            acts = [{"episode_id": episode, "observation": row, "step": step} for episode in episodes]
            answers = http.post("/act/batch", json={"acts": acts}).json()["results"]
        assert [one["policy_version"] for one in answers] == list(alone) * 8
        assert all(near(one["action_probs"], alone[one["policy_version"]]) for one in answers)
        for number in range(NUM_EXTRA):
            http.delete(f"/policy/extra-{number}")
        assert http.put("/policy/side", json={"version": two["version"]}).json()["current"]
        chosen = {"model": "side", "prompt": "row 0", "max_tokens": 1}
        assert http.post("/v1/completions", json=chosen).json()["model"] == "side"
        http.delete("/policy/side")


def test_adapters_act_and_a_replaced_one_meets_no_stale_prefix(lora: Server) -> None:
    with httpx.Client(base_url=lora.url, timeout=120) as http:
        base = probs(http, "toy-text")
        versions = [load(http, "one").json()["policy_version"]]
        first = probs(http, "walker")
        versions.append(load(http, "two").json()["policy_version"])
        second = probs(http, "walker")
        assert not near(base, first)
        assert not near(first, second)
        assert near(base, probs(http, "toy-text")), "the base model has not changed"
        versions.append(load(http, "one").json()["policy_version"])
        assert near(first, probs(http, "walker"))
        assert versions[0] == versions[2] != versions[1]
        models = http.get("/v1/models").json()["data"]
        assert [(model["id"], model["root"]) for model in models] == [("toy-text", "toy-text"), ("walker", "walker")]
        load(http, "output")
        assert not near(base, probs(http, "walker")), "the adapter of the output layer has no effect"
        assert near(base, probs(http, "toy-text")), "the base model's tied weights have changed"
        load(http, "one")
        for path in ("high", "other-model", "none", "../.."):
            refused = load(http, path)
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request"), path
        assert near(first, probs(http, "walker")), "the adapter still works after the rejected ones"
        episode = opened(http, policy="walker", action_space=DISCRETE)
        acted(http, episode, "row 0", step=0)
    lora.kill()
    lora.start()
    with httpx.Client(base_url=lora.url, timeout=120) as http:
        assert acted(http, episode, "row 1", step=1)["policy_version"] == versions[0]
        assert near(first, probs(http, "walker"))
        exported = http.get("/metrics").text
        assert "vllm:generation_tokens_total" in exported
        assert "lora_requests_info" not in exported, "this metric would have a series for each combination of adapters"
        assert http.delete("/policy/walker").status_code == 204
        assert near(base, probs(http, "toy-text"))


def episodic(*arguments: str | Path) -> Any:
    """Runs a command, and returns its JSON."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def teach(http: httpx.Client, policy: str) -> None:
    """Plays episodes that train on the prompt of `probs`, tagged with the name of the policy.

    The observations and the return of an episode follow from its number, and do not depend on the policy. So the
    returns of each group differ, and the gradients of its episodes do not cancel.
    """
    for number in range(8):
        labels = {"tags": [policy], "group": f"{policy}-{number // 2}"}
        sampling = {"temperature": 1, "seed": number}
        episode = opened(http, policy=policy, action_space=DISCRETE, instructions=LONG, sampling=sampling, **labels)
        for step in range(4):
            acted(http, episode, f"row {step}, column {number % 2}", step=step)
        acted(http, episode, "the end", step=4, reward=1.0 - number % 2, terminated=True)


def test_what_was_trained_is_what_acts(lora: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds: play, train, load, play with the adapter, and train it further. The trainer and the engine agree on
    the version of each policy and on the log-probabilities of its actions."""
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))
    torch.set_num_threads(1)  # two threads beside an engine are several times slower
    if lora.process is None or lora.process.poll() is not None:
        lora.start()
    learn = ("train", "--method", "grpo", "--from", lora.url)
    fast = ("--epochs", "4", "--learning-rate", "0.01", "--warmup-steps", "0")
    lesson = lora.folder / "in" / "lesson"
    with httpx.Client(base_url=lora.url, timeout=120) as http:
        teach(http, "toy-text")
        first = episodic(*learn, "--tag", "toy-text", *fast, "--out", lesson)
        assert first["metrics"]["start"]["mean_abs_delta_logprob"] < 0.05
        assert first["data"]["token_kinds"] == {"ids": 1.0}
        loaded = http.put("/policy/pupil", json={"path": "lesson"})
        assert loaded.json()["policy_version"] == first["policy_version"], loaded.text
        assert not near(probs(http, "toy-text"), probs(http, "pupil"))
        teach(http, "pupil")
    second = episodic(*learn, "--tag", "pupil", "--init-adapter", lesson, "--out", tmp_path / "second")
    assert second["initial_policy_version"] == first["policy_version"]
    assert second["metrics"]["start"]["mean_abs_delta_logprob"] < 0.05


MAP = ["SFFFF", "HFFFF", "HHFFF", "HHHFF", "FFFFG"]
"""A lake that the packaged policy never crosses greedily, and now and then at temperature 3."""


def test_it_learns_to_cross_a_lake_from_its_own_episodes(lora: Server, tmp_path: Path, monkeypatch: Any) -> None:
    """The whole loop with the real engine and the real trainer, up to the final test and the moved alias."""
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if lora.process is None or lora.process.poll() is not None:
        lora.start()
    kwargs = json.dumps({"desc": MAP, "is_slippery": False})
    found = episodic(
        *("learn", "--url", lora.url, "--env", "FrozenLake-v1", "--env-kwargs", kwargs, "--out", tmp_path / "crosser"),
        *("--method", "bc", "--episodes", "8", "--repeat", "8", "--temperature", "3", "--max-episode-steps", "20"),
        *("--rounds", "1", "--selection", "12", "--final", "20"),
        *("--learning-rate", "2e-3", "--train-args", "--warmup-steps 0 --epochs 8 --batch-size 8"),
    )
    assert (found["final"]["baseline"]["value"], found["final"]["candidate"]["value"]) == (0.0, 1.0)
    assert found["final"]["verdict"] == "better"
    with httpx.Client(base_url=lora.url) as http:
        policies = {policy["name"]: policy for policy in http.get("/policy").json()["policies"]}
    assert policies["crosser"]["version"] == found["best"]["policy"]
