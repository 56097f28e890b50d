"""Whole rollouts over a real socket. Expected results come from replaying the same episodes in the test."""

import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import gymnasium
import pytest
import typer
from starlette.responses import JSONResponse
from typer.testing import CliRunner

from service.cli.rollout import rollout_command
from service.client import AsyncClient, Retry
from service.environments import describe
from service.rollout import EnvironmentFactory, Report, UnusableEnvironment, rollout
from service.rollout.report import Outcome, percentile, summarize
from tests.client.fake_service import FakeEpisode, FakeService, answer, drop_after, overloaded, problem, serve

RETRY = Retry(max_retries=12, total_s=5.0, first_s=0.001, max_s=0.01)
app = typer.Typer()
app.command("rollout")(rollout_command)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeService, str]]:
    fake = FakeService()
    with serve(fake) as url:
        yield fake, url


@pytest.fixture
def url(served: tuple[FakeService, str]) -> str:
    return served[1]


@pytest.fixture
def fake(served: tuple[FakeService, str]) -> FakeService:
    served[0].clear()
    return served[0]


@pytest.fixture(scope="module", autouse=True)
def environments() -> Iterator[None]:
    gymnasium.register("Broken-v0", entry_point=Broken)
    gymnasium.register("Endless-v0", entry_point=Endless)
    yield
    del gymnasium.registry["Broken-v0"], gymnasium.registry["Endless-v0"]


class Endless(gymnasium.Env[int, int]):
    """An environment that never ends."""

    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return 1, 1.0, False, False, {}


class Broken(Endless):
    """An environment that ends after one step. Action 1 gets NaN as its reward."""

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return 1, math.nan if action else 1.0, True, False, {}


async def play(url: str, env_id: str, max_episode_steps: int | None = None, **options: Any) -> Report:
    async with AsyncClient(url, retry=RETRY) as client:
        return await rollout(EnvironmentFactory(env_id, {}, max_episode_steps), client, **options)


def replay(env_id: str, index: int, seeds: range) -> list[Outcome]:
    """The outcomes of a policy that always takes the action with this index."""
    env = gymnasium.make(env_id)
    text = describe(env)
    outcomes: list[Outcome] = []
    for seed in seeds:
        env.reset(seed=seed)
        terminated = truncated = False
        length, episode_return, reward = 0, 0.0, 0.0
        while not (terminated or truncated):
            _, raw, terminated, truncated, _ = env.step(text.action(text.action_space["actions"][index]))
            reward = float(raw)
            length, episode_return = length + 1, episode_return + reward
        success = text.success(reward, terminated, truncated, episode_return)
        outcomes.append(Outcome(seed, episode_return, length, success))
    return outcomes


def second_action(episode: FakeEpisode, body: dict[str, Any]) -> Any:
    return episode.fields["action_space"]["actions"][1]


@pytest.mark.parametrize("env_id", ["Blackjack-v1", "CartPole-v1", "episodic/FrozenLakeRandom-v0"])
async def test_the_report_is_what_a_replay_of_the_same_seeds_gives(fake: FakeService, url: str, env_id: str) -> None:
    fake.choose = second_action
    report = await play(url, env_id, episodes=20, concurrency=7, seed=5)
    expected = summarize(replay(env_id, 1, range(5, 25)))
    assert report.policy == expected
    assert report.failures == ()
    assert report.random != expected
    assert report.random.episodes == 20

    assert len(fake.episodes) == 20
    assert sorted(episode.fields["metadata"]["seed"] for episode in fake.episodes.values()) == list(range(5, 25))
    assert all(episode.stop_reason for episode in fake.episodes.values()), "an episode was left open"
    assert sum(e.episode_return for e in fake.episodes.values()) == pytest.approx(expected.mean_return * 20)
    assert sum(bool(e.success) for e in fake.episodes.values()) == expected.completion_rate * 20
    assert {e.fields["sampling"]["temperature"] for e in fake.episodes.values()} == {0.0}


async def test_each_step_is_taken_once_though_answers_are_lost(fake: FakeService, url: str) -> None:
    fake.script("/act", *[drop_after, overloaded()] * 5)
    report = await play(url, "CartPole-v1", episodes=4, concurrency=2)
    assert report.policy == summarize(replay("CartPole-v1", 0, range(4)))
    for episode in fake.episodes.values():
        assert [body["step"] for body, _ in episode.acts] == list(range(len(episode.acts)))


async def test_a_failing_episode_is_counted_and_spoils_no_other(fake: FakeService, url: str) -> None:
    fake.script("/act", answer(problem(500, "internal")))
    report = await play(url, "Blackjack-v1", episodes=5, concurrency=1, seed=3)
    assert [(failure.seed, "internal" in failure.error) for failure in report.failures] == [(3, True)]
    assert report.policy == summarize(replay("Blackjack-v1", 0, range(4, 8)))
    assert len(report.as_json()["failures"]) == 1


@pytest.mark.filterwarnings("ignore:.*NaN value")
async def test_a_reward_that_is_no_number_fails_its_episode_alone(fake: FakeService, url: str) -> None:
    seeds = [seed for seed in range(99) if random_action(seed) == 0]  # the random policy must not take action 1
    fake.choose = second_action
    report = await play(url, "Broken-v0", episodes=1, seed=seeds[0])
    (failure,) = report.failures
    message = "the environment returned nan as a reward; rewards must be finite numbers"
    assert failure.error == f"RewardNotFinite: {message}"
    assert (report.policy.episodes, report.random.mean_return) == (0, 1.0)
    json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.filterwarnings("ignore:.*NaN value")
def test_an_environment_that_the_random_policy_breaks_is_named(url: str) -> None:
    ran = CliRunner().invoke(app, ["--env", "Broken-v0", "--episodes", "20", "--url", url])
    message = "the environment returned nan as a reward; rewards must be finite numbers"
    assert (ran.exit_code, ran.stderr) == (1, f"Error: {message}\n")


def random_action(seed: int) -> int:
    space = gymnasium.spaces.Discrete(2)
    space.seed(seed)
    return int(space.sample())


async def test_an_environment_without_an_end_is_truncated(fake: FakeService, url: str) -> None:
    report = await play(url, "Endless-v0", episodes=1)
    assert report.policy.mean_length == 200
    report = await play(url, "Endless-v0", max_episode_steps=3, episodes=2)
    assert report.policy.mean_length == report.random.mean_length == 3
    assert {episode.stop_reason for episode in fake.episodes.values()} == {"truncated"}


async def test_an_episode_that_the_service_ends_is_not_completed(fake: FakeService, url: str) -> None:
    fake.script("/act", answer(done()), answer(done()))
    report = await play(url, "CartPole-v1", episodes=2, concurrency=1)
    assert (report.policy.completion_rate, report.policy.mean_length) == (0.0, 0.0)
    assert report.as_json()["cut"] == {"the service ended the episode": 2}
    assert report.failures == ()


def done() -> JSONResponse:
    return JSONResponse({"episode_id": "e", "step": 0, "action": None, "done": True})


async def test_a_completion_that_is_no_action_ends_the_episode(fake: FakeService, url: str) -> None:
    failure = {"kind": "not_an_action", "detail": "mumble"}
    fake.script("/act", answer(JSONResponse({"episode_id": "e", "step": 0, "parse_failure": failure})))
    report = await play(url, "CartPole-v1", episodes=1)
    assert (report.policy.completion_rate, report.policy.episodes) == (0.0, 1)
    assert report.cut == {"the completion was no action": 1}
    assert [episode.success for episode in fake.episodes.values()] == [False]


async def test_a_slow_environment_steps_beside_the_loop(fake: FakeService, url: str) -> None:
    threads: set[str] = set()

    class Slow(Endless):
        def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
            time.sleep(0.004)
            threads.add(threading.current_thread().name)
            return 1, 1.0, True, False, {}

    gymnasium.register("Slow-v0", entry_point=Slow)
    try:
        report = await play(url, "Slow-v0", episodes=3)
    finally:
        del gymnasium.registry["Slow-v0"]
    assert report.policy.mean_return == 1.0
    assert any(name != threading.main_thread().name for name in threads)


def test_json_holds_the_promised_fields(fake: FakeService, url: str) -> None:
    ran = CliRunner().invoke(app, ["--env", "Blackjack-v1", "--episodes", "6", "--seed", "7", "--url", url, "--json"])
    assert ran.exit_code == 0
    report = json.loads(ran.stdout)
    figures = ["completion_rate", "mean_return", "mean_length", "steps_per_s", "p50_s", "p99_s"]
    assert all(report[name] is not None for name in figures)
    assert (report["env"], report["episodes"], report["failures"]) == ("Blackjack-v1", 6, [])
    assert report["mean_return"] == summarize(replay("Blackjack-v1", 0, range(7, 13))).mean_return
    assert report["random"]["episodes"] == 6


def test_the_table_and_the_exit_code_tell_of_failures(fake: FakeService, url: str) -> None:
    fake.script("/act", answer(problem(500, "internal")))
    ran = CliRunner().invoke(app, ["--env", "Blackjack-v1", "--episodes", "3", "--url", url])
    assert ran.exit_code == 1
    for text in ["completion rate", "mean return", "random", "steps/s", "p99", "1 failed", "internal"]:
        assert text in ran.stdout


def test_env_kwargs_reach_the_environment(fake: FakeService, url: str) -> None:
    sized = ["--env", "episodic/FrozenLakeRandom-v0", "--env-kwargs", '{"size": 8}', "--episodes", "1", "--url", url]
    assert CliRunner().invoke(app, sized).exit_code == 0
    (episode,) = fake.episodes.values()
    assert "7: " in episode.acts[0][0]["observation"]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--env", "NoSuch-v0"], "NoSuch", 1),
        (["--env", "no_such_module:Thing-v0"], "no_such_module", 1),
        (["--env", "Blackjack-v1", "--env-kwargs", '{"bad": 1}'], "bad", 1),
        (["--env-kwargs", "[1]"], "JSON object", 2),
        (["--env-kwargs", "{"], "JSON", 2),
        (["--episodes", "0"], "episodes", 2),
        (["--url", "localhost:1"], "http://", 2),
        (["--url", "http://127.0.0.1:1"], "no service answers at http://127.0.0.1:1", 1),
    ],
)
def test_a_mistake_is_named(arguments: list[str], message: str, code: int) -> None:
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == code
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


async def test_an_unknown_environment_is_an_error_before_any_call(fake: FakeService, url: str) -> None:
    with pytest.raises(UnusableEnvironment, match="NoSuch"):
        await play(url, "NoSuch-v0")
    assert fake.received == []


def test_percentiles_are_observed_values() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile([3.0], 99)) == (50.0, 99.0, 3.0)
    assert percentile([], 50) is None
    assert summarize([]).mean_return is None
