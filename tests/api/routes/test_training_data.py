"""`format=tokens` for training: supports, temperature and recorded tokens, on both stores."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Sampling
from tests.support.databases import execute
from tests.support.serving import DISCRETE, Served, serve

TURNS = {"type": "discrete", "actions": ["left", "right", "up"]}
FILTERED, ALL = {"kind": "filtered"}, {"kind": "all"}
LISTS = ("token_ids", "loss_mask", "logprobs", "support", "recorded_mask")


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


async def segments(api: Served, name: str | None = None) -> list[Any]:
    """Returns the segments of an episode, after the checks that hold for each of them."""
    found = (await api.trajectory(name, format="tokens"))["segments"]
    for segment in found:
        assert len({len(segment[name]) for name in LISTS}) == 1
        assert [entry is not None for entry in segment["support"]] == [bool(mask) for mask in segment["loss_mask"]]
        assert not any(mask and recorded for mask, recorded in zip(*map(segment.get, LISTS[1::3]), strict=True))
    return found


def drawn_among(segment: Any) -> list[Any]:
    return [entry for entry in segment["support"] if entry]


async def record(api: Served, action: Any, **fields: Any) -> None:
    answer = await api.client.post(f"{api.path}/action", json={"observation": "x", "action": action, **fields})
    assert answer.status_code == 200, answer.text


async def test_a_discrete_action_was_drawn_among_the_legal_actions_first_tokens(api: Served):
    await api.open(action_space=TURNS)
    await api.act()
    await api.act(legal_actions=["right", "up"])
    await api.act(legal_actions=["up"])
    (segment,) = await segments(api)
    first = {action: api.engine.tokenizer.encode(action)[0] for action in TURNS["actions"]}
    found = [(entry["kind"], set(entry["ids"])) for entry in drawn_among(segment)]
    assert found == [("ids", set(first.values())), ("ids", {first["right"], first["up"]})]


async def test_text_was_drawn_among_all_tokens_unless_they_were_filtered(api: Served):
    await api.open("plain", sampling={"temperature": 0.7}, reasoning={"max_tokens": 4})
    await api.open("top", sampling={"temperature": 0.7, "top_k": 5})
    await api.open("json", action_space={"type": "json", "schema": {"type": "integer"}})
    for name, support in (("plain", ALL), ("top", FILTERED), ("json", FILTERED)):
        await api.act(name)
        (segment,) = await segments(api, name)
        supports = drawn_among(segment)
        assert supports == [support] * len(supports) != []


async def test_recorded_tokens_are_marked_where_their_step_is_the_segments(api: Served):
    await api.open(action_space=TURNS, context={"max_tokens": 64}, sampling={"temperature": 1})
    for step in range(0, 12, 2):
        await record(api, "left", step=step)
        await api.act(observation=f"observation {step}", step=step + 1)
    found = await segments(api)
    assert len(found) > 2, "the context must have slid"
    terminator = api.engine.prompt.terminator
    recorded = [
        [token for token, mask in zip(segment["token_ids"], segment["recorded_mask"], strict=True) if mask]
        for segment in found
    ]
    assert list(chain(*recorded)) == [*api.engine.prompt.encode_reply("left"), terminator] * 6
    assert sum(len(drawn_among(segment)) for segment in found) == 6, "a token of the context has a support"


async def test_a_fork_has_the_supports_of_the_steps_that_it_shares(api: Served):
    await api.open(action_space=DISCRETE, sampling={"temperature": 1, "seed": 3})
    await api.act()
    await record(api, "right")
    (parent,) = await segments(api)
    await api.client.post(f"{api.path}/fork", json={"n": 1, "episode_ids": ["f"]})
    await api.act("f")
    (fork,) = await segments(api, "f")
    for name in LISTS:
        assert fork[name][: len(parent[name])] == parent[name]
    assert len(drawn_among(fork)) > len(drawn_among(parent)) > 0


@pytest.mark.parametrize(("asked", "effective"), [({"temperature": 0.7}, 0.7), ({"temperature": 0}, 1.0), ({}, 1.0)])
async def test_the_temperature_is_the_effective_one(api: Served, asked: Any, effective: float):
    """The default of the scripted engine is 0."""
    await api.open(sampling=asked)
    await api.act()
    (segment,) = await segments(api)
    assert segment["temperature"] == effective


async def test_a_change_of_the_default_temperature_starts_a_segment(tmp_path: Path, tokenizer: HFTokenizer):
    for step, temperature in enumerate((0.5, 2.0)):
        engine = ScriptedEngine(tokenizer)
        engine.info = replace(engine.info, default_sampling=Sampling(temperature=temperature, max_tokens=8))
        async with serve(tmp_path, engine) as api:
            if not step:
                await api.open(action_space=TURNS)
            await api.act(step=step)
            found = await segments(api)
    assert [(segment["steps"], segment["temperature"]) for segment in found] == [([0], 0.5), ([1], 2.0)]
    assert found[1]["token_ids"][: len(found[0]["token_ids"])] == found[0]["token_ids"]
    assert [len(drawn_among(segment)) for segment in found] == [1, 1]


@pytest.mark.parametrize(("asked", "effective"), [({"temperature": 0.7}, 0.7), ({}, 1.0)])
async def test_steps_of_older_versions_promise_nothing(api: Served, asked: Any, effective: float):
    await api.open(action_space=TURNS, sampling=asked)
    await api.act()
    await record(api, "left")
    await execute(api.store_url, "UPDATE steps SET support = NULL, temperature = NULL, seconds = NULL")
    (segment,) = await segments(api)
    assert drawn_among(segment) == [FILTERED]
    assert segment["temperature"] == effective
    assert not any(segment["recorded_mask"])


async def test_the_seconds_of_an_act_are_stored_until_its_commit(api: Served):
    await api.open(action_space=TURNS)
    act = await api.act()
    await record(api, "left")
    await api.client.post(f"{api.path}/end", json={"terminated": True})
    decided, *others = await api.app.state.services.sessions.store.steps("e")
    assert 0 < decided.seconds <= act["timing"]["total_s"] - act["timing"]["store_s"]
    assert [(step.seconds, step.closing) for step in others] == [(None, False), (None, True)]


async def test_step_starts_divide_a_segment_into_the_spans_of_its_steps(api: Served):
    await api.open(action_space=TURNS, context={"max_tokens": 64})
    for step in range(8):
        await api.act(observation=f"observation {step}", step=step)
    found = await segments(api)
    assert len(found) > 1, "the context must have slid"
    stored = await api.app.state.services.sessions.store.steps("e")
    for segment in found:
        bounds = pairwise([*segment["step_starts"], len(segment["token_ids"])])
        for step, (start, end) in zip(segment["steps"], bounds, strict=True):
            assert segment["token_ids"][start:end] == list(stored[step].span.token_ids)


async def test_rewards_belong_to_the_action_that_caused_them(api: Served):
    await api.open(action_space=TURNS, context={"max_tokens": 64})
    for step in range(8):
        await api.act(observation=f"observation {step}", step=step, **({"reward": step / 2} if step > 1 else {}))
    await api.client.post(f"{api.path}/end", json={"terminated": True, "reward": 9})
    found = await segments(api)
    assert len(found) > 1, "the context must have slid"
    rewards = [reward for segment in found for reward in segment["rewards"]]
    assert rewards == [None, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 9.0]


@pytest.mark.parametrize("path", ["/episode/e/trajectory?format=tokens", "/export?format=tokens"])
async def test_the_ratings_come_with_the_tokens(api: Served, path: str):
    await api.open(action_space=TURNS)
    await api.act()
    for rated in ({"rating": 4, "step": 0}, {"rating": 2, "comment": "slow"}):
        await api.client.post(f"{api.path}/feedback", json=rated)
    await api.client.post(f"{api.path}/end", json={"terminated": True})
    (document,) = [json.loads(line) for line in (await api.client.get(path)).text.splitlines()]
    assert [(given["step"], given["rating"], given["comment"]) for given in document["feedback"]] == [
        (0, 4, None),
        (None, 2, "slow"),
    ]
