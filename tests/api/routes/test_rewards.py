"""The sum of an episode's rewards stays finite on every path, and no return distorts the metrics of others."""

import math
from pathlib import Path
from typing import Any

import pytest

from service.engine.tokenizer import HFTokenizer
from service.observability import metrics
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import StopReason
from tests.support.serving import DISCRETE, serve

pytestmark = pytest.mark.store("sqlite")
"""Nothing here depends on the kind of store."""

HUGE = 1.7e308
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "act": ("/act", {"episode_id": "e", "observation": "x", "reward": HUGE}),
    "act at a step": ("/act", {"episode_id": "e", "observation": "x", "reward": HUGE, "step": 2}),
    "closing act": ("/act", {"episode_id": "e", "terminated": True, "reward": HUGE}),
    "record": ("/episode/e/action", {"observation": "x", "action": "left", "reward": HUGE}),
    "end": ("/episode/e/end", {"reward": HUGE}),
    "end with a success": ("/episode/e/end", {"reward": HUGE, "terminated": True, "success": True}),
}


@pytest.mark.parametrize(("path", "body"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "evicted"])
@pytest.mark.parametrize("forked", [False, True], ids=["", "fork"])
async def test_a_reward_that_makes_the_return_infinite_is_refused(
    tmp_path: Path, tokenizer: HFTokenizer, path: str, body: dict[str, Any], cached: bool, forked: bool
):
    async with serve(tmp_path, ScriptedEngine(tokenizer), max_live_episodes=1) as api:
        name = "parent" if forked else "e"
        await api.open(name, action_space=DISCRETE, max_steps=2)
        await api.act(name)
        await api.act(name, reward=-HUGE)
        if forked:
            fork = {"episode_ids": ["e"]}
            assert (await api.client.post("/episode/parent/fork", json=fork)).status_code == 201
        if not cached:
            await api.open("another")
        answer = await api.client.post(path, json={**body, "reward": -HUGE})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert answer.json()["errors"][0]["loc"] == ["reward"]
        episode = await api.get()
        assert (episode["status"], episode["episode_return"]) == ("active", -HUGE)
        ended = await api.client.post("/episode/e/end", json={"reward": HUGE})
        assert ended.json()["episode_return"] == 0.0


async def test_a_fork_has_the_return_that_its_parent_had_at_the_step(tmp_path: Path, tokenizer: HFTokenizer):
    """Rounded after each reward, these do not overflow. Their exact sum would."""
    largest, half_ulp = 1.7976931348623157e308, 9.9792015476736e291
    rewards = [largest, *[half_ulp * 0.9] * 8, 0.1, 0.2, -largest]
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.open()
        await api.act()
        returns = []
        for reward in rewards:
            await api.act(reward=reward)
            returns.append((await api.get())["episode_return"])
        for step, expected in enumerate(returns, start=2):
            forked = await api.client.post("/episode/e/fork", json={"at_step": step})
            assert forked.json()["episodes"][0]["episode_return"] == expected


def returns_of(profile: str) -> float:
    return sum(metrics.RETURNS.labels(profile, sign)._value.get() for sign in ("positive", "negative"))


def test_no_return_hides_the_returns_of_others():
    before = returns_of("none")
    for episode_return in (math.inf, -math.inf, HUGE, -HUGE, 1e17):
        metrics.count_end(StopReason.TERMINATED, None, episode_return, 1)
    after = returns_of("none")
    assert math.isfinite(after)
    metrics.count_end(StopReason.TERMINATED, None, 0.5, 1)
    assert returns_of("none") - after == pytest.approx(0.5, abs=1e-3)
    assert after > before
