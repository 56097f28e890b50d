"""Vector environments of Gymnasium against the real service with a scripted engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gymnasium
import httpx
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, vector
from gymnasium.wrappers.vector import DictInfoToList
from gymnasium.wrappers.vector import RecordEpisodeStatistics as RecordVectorEpisodeStatistics

from service.client import Client
from service.engine.tokenizer import HFTokenizer
from service.environments.generic import GenericText
from service.rollout import Run, play_vector
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import Served, serve

MODE: Any = {"autoreset_mode": AutoresetMode.DISABLED}


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as served:
        yield served


async def play(api: Served, envs: Any, **options: Any) -> list[float]:
    def call() -> list[float]:
        with Client(api.url) as client:
            return list(play_vector(client, envs, **options))

    return await asyncio.to_thread(call)


async def episodes(api: Served, **where: Any) -> list[dict[str, Any]]:
    return (await api.client.get("/episode", params={"limit": 100, **where})).json()["episodes"]


async def test_a_vector_environment_is_driven_by_batches(api: Served):
    envs = gymnasium.make_vec(
        "CliffWalking-v1", num_envs=4, vectorization_mode="sync", vector_kwargs=MODE, max_episode_steps=9
    )
    returns = await play(api, envs, num_episodes=6, temperature=1.0)
    assert len(returns) >= 6
    found = await episodes(api, status="ended")
    over = [episode for episode in found if episode["success"] is not None]
    assert sorted(episode["episode_return"] for episode in over)[: len(returns)] == sorted(returns)
    assert all(0 < episode["step"] <= 9 for episode in found)
    for episode in found:
        steps = (await api.trajectory(episode["episode_id"]))["steps"]
        assert all(step["reward"] is not None for step in steps), "an action has no reward"
    assert await episodes(api, status="active") == []


async def test_a_vector_rollout_that_is_left_ends_its_episodes(api: Served):
    envs = gymnasium.make_vec("Blackjack-v1", num_envs=8, vectorization_mode="sync", vector_kwargs=MODE)

    def use() -> None:
        with (
            Client(api.url) as client,
            contextlib.closing(play_vector(client, envs, num_episodes=100, temperature=1.0)) as returns,
        ):
            next(returns)

    await asyncio.to_thread(use)
    assert {episode["status"] for episode in await episodes(api)} == {"ended"}


async def test_each_episode_has_its_environment_its_seed_and_its_run(api: Served):
    envs = gymnasium.make_vec("Blackjack-v1", num_envs=3, vectorization_mode="sync", vector_kwargs=MODE)
    run = Run(tags=("mine",), group="g")
    await play(api, envs, num_episodes=7, seed=5, run=run)
    found = await episodes(api)
    assert {tuple(episode["tags"]) for episode in found} == {("rollout", run.tag, "mine")}
    assert {(episode["group"], episode["metadata"]["env"]) for episode in found} == {("g", "Blackjack-v1")}
    assert sorted(episode["metadata"]["seed"] for episode in found) == list(range(5, 5 + len(found)))
    single: Any = gymnasium.make("Blackjack-v1")
    for episode in found:
        (player, dealer, ace), _ = single.reset(seed=episode["metadata"]["seed"])
        steps = (await api.trajectory(episode["episode_id"]))["steps"]
        expected = f"sum {player}, dealer {dealer}, usable ace {'yes' if ace else 'no'}"
        assert steps[0]["observation"] == expected, "the seed does not reproduce the episode"


def test_another_autoreset_mode_is_refused():
    envs = gymnasium.make_vec("CliffWalking-v1", num_envs=2, vectorization_mode="sync")
    with (
        pytest.raises(ValueError, match="DISABLED"),
        Client(transport=httpx.MockTransport(lambda _: httpx.Response(200))) as client,
    ):
        next(play_vector(client, envs, num_episodes=1))


class Coins(gymnasium.Env[Any, Any]):
    """Ends after two steps. Its infos are nested, and some steps have other keys than others."""

    observation_space = spaces.Discrete(9)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space
        self.num_steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.num_steps, self.seed = 0, seed
        return 0, {"seed": seed, "_private": 1, "deep": {"er": {"seed": seed}}}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.num_steps += 1
        rare = {"rare": self.seed} if self.num_steps == (self.seed or 0) % 3 else {}
        info = {"steps": self.num_steps, "is_success": self.seed == 1, **rare}
        return self.num_steps, 1.0, self.num_steps == 2, False, info


class Witness(GenericText):
    """Keeps the infos that it is shown."""

    seen: Any = None

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        self.seen.append((int(observation), info))
        return super().observation(observation, info)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(Witness, "seen", found)
    return found


def plain(envs: Any) -> Any:
    return envs


@pytest.mark.parametrize(
    ("around", "within"),
    [
        (plain, plain),
        (plain, RecordEpisodeStatistics),
        (RecordVectorEpisodeStatistics, plain),
        (DictInfoToList, plain),
        (DictInfoToList, RecordEpisodeStatistics),
    ],
)
async def test_each_copy_sees_its_own_info(
    api: Served, seen: list[Any], around: Callable[[Any], Any], within: Callable[[Any], Any]
):
    copies = [lambda: within(Coins(spaces.Discrete(2))) for _ in range(3)]
    envs = around(SyncVectorEnv(copies, autoreset_mode=AutoresetMode.DISABLED))
    returns = await play(api, envs, num_episodes=3, describe=Witness)
    assert returns == [2.0, 2.0, 2.0]
    first, second = seen[:3], seen[6:9]
    for seed, (observation, info) in enumerate(first):
        assert observation == 0
        assert info["seed"] == seed
        assert ("_private" in info) == (around is not DictInfoToList)  # that wrapper drops such keys
        assert info["deep"]["er"]["seed"] == seed
    for seed, (observation, info) in enumerate(second):
        assert observation == info["steps"] == 2
        assert info.get("rare") == (2 if seed == 2 else None)
        if within is RecordEpisodeStatistics or around is RecordVectorEpisodeStatistics:
            assert (info["episode"]["r"], info["episode"]["l"]) == (2.0, 2)
    success = {episode["metadata"]["seed"]: episode["success"] for episode in await episodes(api)}
    assert {seed: success[seed] for seed in range(3)} == {0: False, 1: True, 2: False}
    assert [observation for observation, _ in seen[:12]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]


REPLIES = [
    (spaces.Tuple((spaces.Discrete(2), spaces.Box(0.0, 1.0, (2,)))), "[1, [0.5, 0.25]]"),
    (spaces.Dict({"gear": spaces.Discrete(3), "on": spaces.MultiBinary(2)}), '{"gear": 2, "on": [0, 1]}'),
    (spaces.Text(4, charset="abc"), "abc"),
    (spaces.Sequence(spaces.Discrete(3)), "[0, 2]"),
    (spaces.OneOf((spaces.Discrete(2), spaces.Text(3))), '[1, "xy"]'),
    (spaces.Box(-1, 1, (2, 2), np.int8), "[[0, 1], [-1, 0]]"),
    (spaces.Tuple((spaces.Box(0.0, 1.0, (0,)), spaces.Discrete(2))), "[[], 1]"),
]


@pytest.mark.parametrize(("space", "reply"), REPLIES, ids=lambda value: str(value)[:30])
async def test_any_action_space_reaches_the_copies(tmp_path: Path, tokenizer: HFTokenizer, space: Any, reply: str):
    envs = SyncVectorEnv([lambda: Coins(space)] * 2, autoreset_mode=AutoresetMode.DISABLED)
    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=lambda _: reply)) as api:
        assert await play(api, envs, num_episodes=2) == [2.0, 2.0]
        ended = await episodes(api, status="ended")
        assert sum(episode["stop_reason"] == "terminated" for episode in ended) == 2


async def test_an_episode_without_an_action_is_over_and_the_others_go_on(tmp_path: Path, tokenizer: HFTokenizer):
    def reply(prompt: str) -> str:
        return "no action" if prompt.endswith("1") else "[1]"  # the prompt ends with the observation

    envs = SyncVectorEnv([lambda: Coins(spaces.MultiDiscrete([2]))] * 2, autoreset_mode=AutoresetMode.DISABLED)
    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=reply)) as api:
        assert await play(api, envs, num_episodes=4) == [1.0] * 4
        found = await episodes(api)
        assert await episodes(api, status="active") == []
        assert [e["episode_return"] for e in found if e["step"] == 2] == [1.0] * 4
        assert {e["success"] for e in found if e["step"] == 2} == {False}


@pytest.mark.parametrize("at_end", [False, True])
async def test_an_episode_whose_act_fails_is_over_and_the_others_go_on(
    api: Served, caplog: pytest.LogCaptureFixture, at_end: bool
):
    class Stranger(GenericText):
        """Another caller deletes the episode of seed 1 before its second or its last act."""

        def observation(self, observation: Any, info: dict[str, Any]) -> str:
            if info.get("steps") == (2 if at_end else 1) and not deleted:
                with Client(api.url) as other:
                    deleted.append(next(other.episodes(metadata={"seed": 1})).episode_id)
                    other.resume(deleted[0]).delete()
            return super().observation(observation, info)

    deleted: list[str] = []
    envs = SyncVectorEnv([lambda: Coins(spaces.Discrete(2))] * 3, autoreset_mode=AutoresetMode.DISABLED)
    assert await play(api, envs, num_episodes=6, describe=Stranger) == [2.0] * 5
    assert await episodes(api, status="active") == []
    assert deleted[0] in caplog.text


class Faulty(Coins):
    """The second reward of seed 1 is NaN."""

    def step(self, action: Any) -> Any:
        observation, reward, *others = super().step(action)
        return observation, np.nan if (self.seed, self.num_steps) == (1, 2) else reward, *others


async def test_a_reward_that_is_no_number_fails_its_episode_alone(api: Served):
    envs = SyncVectorEnv([lambda: Faulty(spaces.Discrete(2))] * 2, autoreset_mode=AutoresetMode.DISABLED)
    assert await play(api, envs, num_episodes=4) == [2.0] * 3
    (failed,) = await episodes(api, **{"metadata.seed": 1})
    assert (failed["stop_reason"], failed["episode_return"]) == ("aborted", 1.0)


@pytest.mark.parametrize(
    ("wrap", "shown"),
    [
        (lambda envs: vector.RescaleAction(envs, np.float32(-5), np.float32(5)), {"minimum": -5.0, "maximum": 5.0}),
        (lambda envs: vector.ReshapeObservation(envs, (3, 1)), None),
        (lambda envs: vector.TransformAction(envs, lambda action: -action, envs.action_space), None),
    ],
)
async def test_the_policy_is_told_of_the_spaces_that_vector_wrappers_make(
    tmp_path: Path, tokenizer: HFTokenizer, wrap: Callable[[Any], Any], shown: dict[str, float] | None
):
    envs = wrap(
        gymnasium.make_vec(
            "Pendulum-v1", num_envs=2, vectorization_mode="sync", vector_kwargs=MODE, max_episode_steps=2
        )
    )
    async with serve(tmp_path, ScriptedEngine(tokenizer, reply=lambda _: "[1.5]")) as api:
        assert len(await play(api, envs, num_episodes=2)) == 2
        found = await episodes(api, status="ended")
    assert {episode["action_space"]["type"] for episode in found} == {"json"}, "described without the wrapper"
    if shown is not None:
        items = found[0]["action_space"]["schema"]["items"]
        assert {name: items[name] for name in shown} == shown


def test_a_vector_environment_without_copies_is_refused():
    envs: Any = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")
    with (
        pytest.raises(ValueError, match="SyncVectorEnv, not CartPoleVectorEnv"),
        Client(transport=httpx.MockTransport(lambda _: httpx.Response(200))) as client,
    ):
        next(play_vector(client, envs, num_episodes=1))
