"""Whole rollouts over a real socket. Expected results come from replaying the same episodes in the test."""

import asyncio
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import typer
from starlette.responses import JSONResponse
from typer.testing import CliRunner

from service.cli.rollout import rollout_command
from service.client import AsyncClient, AsyncEpisode, Retry
from service.environments import describe
from service.rollout import EnvironmentFactory, Report, RewardNotFinite, Run, UnusableEnvironment, rollout
from service.rollout.environment import added
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
    gymnasium.register("Once-v0", entry_point=Once, disable_env_checker=True)
    gymnasium.register("Speller-v0", entry_point=Speller, disable_env_checker=True)
    yield
    for name in ("Broken-v0", "Endless-v0", "Once-v0", "Speller-v0"):
        del gymnasium.registry[name]


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


class Once(Endless):
    """An environment that ends after one step, with this info and the return 1."""

    info: ClassVar[dict[str, Any]] = {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return 1, 1.0, True, False, dict(self.info)


class Speller(Endless):
    """An environment whose actions are texts of a, b and c."""

    action_space: Any = gymnasium.spaces.Text(8, charset="abc")

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        if action == "bbbb":
            raise RuntimeError("the speller does not like bbbb")
        return 1, 1.0, True, False, {}


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 - the fake service runs in another thread
        await asyncio.sleep(0.001)


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
        outcomes.append(Outcome(seed, episode_return, length, success, terminated))
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
    assert {e.success for e in fake.episodes.values()} <= {True, False}
    assert {e.fields["sampling"]["temperature"] for e in fake.episodes.values()} == {0.0}


async def test_each_step_is_taken_once_though_answers_are_lost(fake: FakeService, url: str) -> None:
    fake.script("/act", *[drop_after, overloaded()] * 5)
    report = await play(url, "CartPole-v1", episodes=4, concurrency=2)
    assert report.policy == summarize(replay("CartPole-v1", 0, range(4)))
    for episode in fake.episodes.values():
        assert [body["step"] for body, _ in episode.acts] == list(range(len(episode.acts)))


async def test_a_failing_episode_is_counted_and_ended_and_spoils_no_other(fake: FakeService, url: str) -> None:
    fake.script("/act", answer(problem(500, "internal")))
    report = await play(url, "Blackjack-v1", episodes=5, concurrency=1, seed=3)
    assert [(failure.seed, "internal" in failure.error) for failure in report.failures] == [(3, True)]
    assert report.policy == summarize(replay("Blackjack-v1", 0, range(4, 8)))
    assert len(report.as_json()["failures"]) == 1
    assert len(fake.episodes) == 5
    assert all(episode.stop_reason for episode in fake.episodes.values()), "an episode was left open"


async def test_a_restart_of_the_service_loses_nothing() -> None:
    fake = FakeService()
    async with AsyncExitStack() as stack:
        first = stack.enter_context(ExitStack())
        url = first.enter_context(serve(fake))
        retry = Retry(total_s=60.0, first_s=0.001, max_s=0.05)
        client = await stack.enter_async_context(AsyncClient(url, retry=retry))
        factory = EnvironmentFactory("CartPole-v1")
        playing = asyncio.create_task(rollout(factory, client, episodes=40, concurrency=8))
        await until(lambda: len(fake.bodies("/act")) > 100)
        await asyncio.to_thread(first.close)  # the client closes its connections meanwhile
        num_acts = len(fake.bodies("/act"))
        fake.script("/act", *[overloaded()] * 50)
        stack.enter_context(serve(fake, port=int(url.rpartition(":")[2])))
        report = await playing
    assert len(fake.bodies("/act")) > num_acts
    assert report.failures == ()
    assert report.policy == summarize(replay("CartPole-v1", 0, range(40)))


async def test_a_rollout_that_is_cancelled_ends_its_episodes(fake: FakeService, url: str) -> None:
    async with AsyncClient(url, retry=RETRY) as client:
        playing = asyncio.create_task(rollout(EnvironmentFactory("Endless-v0", {}, 10_000), client, episodes=1))
        await until(lambda: fake.episodes)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
    assert all(episode.stop_reason for episode in fake.episodes.values())


async def test_an_episode_that_is_opened_during_a_cancellation_ends(
    fake: FakeService, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service has opened it, but the answer has not arrived."""
    is_opened, opened = asyncio.Event(), AsyncClient.episode

    async def slow(client: AsyncClient, **fields: Any) -> AsyncEpisode:
        episode = await opened(client, **fields)
        is_opened.set()
        await asyncio.sleep(0.05)
        return episode

    monkeypatch.setattr(AsyncClient, "episode", slow)
    async with AsyncClient(url, retry=RETRY) as client:
        playing = asyncio.create_task(rollout(EnvironmentFactory("Endless-v0", {}, 10_000), client, episodes=1))
        await is_opened.wait()
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
    (episode,) = fake.episodes.values()
    assert episode.stop_reason


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
async def test_an_episode_that_the_random_policy_breaks_fails_alone(fake: FakeService, url: str) -> None:
    report = await play(url, "Broken-v0", episodes=20)
    broken = sum(random_action(seed) for seed in range(20))
    assert (report.policy.episodes, report.random.episodes) == (20, 20 - broken)
    assert len(report.failures) == broken
    assert all(failure.error.startswith("random policy: RewardNotFinite: ") for failure in report.failures)


@pytest.mark.parametrize("place", ["reset", "step"])
def test_an_environment_that_always_fails_is_named(url: str, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("the simulator is gone")

    monkeypatch.setattr(Endless, place, fail)
    ran = CliRunner().invoke(app, ["--env", "Endless-v0", "--episodes", "2", "--url", url])
    assert (ran.exit_code, ran.stderr) == (1, "Error: Endless-v0: RuntimeError: the simulator is gone\n")


@pytest.mark.parametrize(
    ("reward", "number"),
    [
        (np.float32(1.5), 1.5),
        (np.array([2]), 2.0),
        (np.array(2.5), 2.5),
        (True, 1.0),
        (10**30, 1e30),
        *((wrong, None) for wrong in (None, "x", math.inf, 10**400, [1.0, 2.0], object())),
    ],
)
def test_a_reward_is_one_finite_number(reward: Any, number: float | None) -> None:
    if number is not None:
        assert added(1.0, reward) == (number, 1.0 + number)
        return
    with pytest.raises(RewardNotFinite, match="as a reward"):
        added(1.0, reward)


def test_a_return_beyond_the_floats_is_refused() -> None:
    with pytest.raises(RewardNotFinite, match="sum"):
        added(1.7e308, 1.7e308)


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
    assert report.as_json()["ended_early"] == {"ended_by_service": 2}
    assert report.failures == ()


def done() -> JSONResponse:
    return JSONResponse({"episode_id": "e", "step": 0, "action": None, "done": True})


async def test_a_completion_that_is_no_action_ends_the_episode(fake: FakeService, url: str) -> None:
    failure = {"kind": "not_an_action", "detail": "mumble"}
    fake.script("/act", answer(JSONResponse({"episode_id": "e", "step": 0, "parse_failure": failure})))
    report = await play(url, "CartPole-v1", episodes=1)
    assert (report.policy.completion_rate, report.policy.episodes) == (0.0, 1)
    assert report.ended_early == {"parse_failure": 1}
    assert [episode.success for episode in fake.episodes.values()] == [False]


async def test_one_action_outside_the_space_ends_its_episode_alone(fake: FakeService, url: str) -> None:
    fake.choose = lambda episode, body: "abc" if episode.fields["metadata"]["seed"] else "not of these characters"
    report = await play(url, "Speller-v0", episodes=4, concurrency=2)
    assert (report.policy.episodes, report.ended_early, report.failures) == (4, {"parse_failure": 1}, ())
    assert report.policy.mean_return == 3 / 4
    assert all(episode.stop_reason for episode in fake.episodes.values())


async def test_an_error_in_the_environment_fails_its_episode_alone(fake: FakeService, url: str) -> None:
    fake.choose = lambda episode, body: "c" if episode.fields["metadata"]["seed"] else "bbbb"
    report = await play(url, "Speller-v0", episodes=4, concurrency=2)
    assert [failure.error for failure in report.failures] == ["RuntimeError: the speller does not like bbbb"]
    assert report.policy.episodes == 3
    assert all(episode.stop_reason for episode in fake.episodes.values())


def test_a_refusal_to_open_an_episode_ends_the_rollout_and_is_named(fake: FakeService, url: str) -> None:
    fake.script("/episode", *[answer(problem(422, "invalid_request"))] * 9)
    ran = CliRunner().invoke(app, ["--env", "Speller-v0", "--episodes", "9", "--concurrency", "1", "--url", url])
    assert ran.exit_code == 1
    assert ran.stderr.startswith("Error: the service refuses to open an episode of Speller-v0: invalid_request (422)")
    assert len(fake.bodies("/episode")) == 1


# --- what counts as a success


@pytest.mark.parametrize(
    ("info", "success_at", "success"),
    [
        ({}, None, None),
        ({}, 1.0, True),
        ({}, 1.5, False),
        ({"is_success": True}, None, True),
        ({"success": 0.0}, None, False),
        ({"is_success": np.float32(1)}, None, True),
        ({"success": np.array([True])}, None, True),
        ({"is_success": False}, 1.0, True),
        ({"success": "yes"}, None, None),
        ({"success": None}, None, None),
        ({"success": math.nan}, None, None),
    ],
)
async def test_success_is_null_unless_something_defines_it(
    fake: FakeService, url: str, info: dict[str, Any], success_at: float | None, success: bool | None
) -> None:
    Once.info = info
    report = await play(url, "Once-v0", episodes=3, run=Run(success_at=success_at))
    assert [episode.success for episode in fake.episodes.values()] == [success] * 3
    for summary in (report.policy, report.random):
        assert summary.completion_rate == (None if success is None else float(success))
        assert summary.success_unknown == (3 if success is None else 0)
        assert summary.terminated == 3


async def test_an_episode_that_is_cut_is_no_success_whatever_its_return(fake: FakeService, url: str) -> None:
    fake.script("/act", answer(done()))
    report = await play(url, "Once-v0", episodes=1, run=Run(success_at=-100.0))
    assert report.policy.completion_rate == 0.0


def test_the_table_says_why_completion_is_absent(fake: FakeService, url: str) -> None:
    Once.info = {}
    command = ["--env", "Once-v0", "--episodes", "3", "--url", url]
    ran = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert ran.exit_code == 0
    cells = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in ran.stdout.splitlines() if "│" in line}
    assert (cells["completion rate"], cells["terminated"]) == ("-", "3")
    assert "The success of 3 of 3 episodes is unknown" in ran.stdout
    assert "--success-at" in ran.stdout
    defined = CliRunner().invoke(app, [*command, "--success-at", "1"], env={"COLUMNS": "200"})
    assert "1.000" in defined.stdout
    assert "unknown" not in defined.stdout


# --- runs and their labels


def test_runs_can_be_told_apart(fake: FakeService, url: str) -> None:
    options = ["--env", "Blackjack-v1", "--episodes", "2", "--url", url, "--tag", "mine", "--tag", "too"]
    reports = [json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout) for _ in range(2)]
    tags = [report["tag"] for report in reports]
    assert tags == [f"run:{report['run_id']}" for report in reports]
    assert len(set(tags)) == 2
    found = [episode.fields["tags"] for episode in fake.episodes.values()]
    assert found == [["rollout", tag, "mine", "too"] for tag in tags for _ in range(2)]
    for report in reports:
        assert report["export_command"].startswith(f"episodic export --tag {report['tag']} ")
        assert report["export_command"].endswith(f"--url {url}")
    shown = CliRunner().invoke(app, options).stdout
    tag = list(fake.episodes.values())[-1].fields["tags"][1]
    assert f"Run {tag.removeprefix('run:')}. Export its episodes:\n  episodic export --tag {tag} " in shown


def test_options_reach_the_episodes(fake: FakeService, url: str) -> None:
    options = ["--group", "g", "--policy", "p", "--instructions", "Play.", "--temperature", "0.5"]
    command = ["--env", "Blackjack-v1", "--episodes", "1", "--url", url]
    assert CliRunner().invoke(app, [*command, *options]).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--profile", "mine"]).exit_code == 0
    given, profiled = [episode.fields for episode in fake.episodes.values()]
    assert (given["group"], given["policy"], given["instructions"]) == ("g", "p", "Play.")
    assert given["sampling"] == {"temperature": 0.5}
    assert profiled["profile"] == "mine"
    assert not {"instructions", "sampling", "policy", "group"} & set(profiled), "the profile's own values count"
    assert profiled["action_space"] == given["action_space"]


@pytest.mark.parametrize(("group", "name"), [(None, None), ("g", "g")])
async def test_plays_of_one_seed_share_a_group(
    fake: FakeService, url: str, group: str | None, name: str | None
) -> None:
    run = Run(group=group)
    report = await play(url, "Blackjack-v1", episodes=2, repeat=3, seed=7, run=run)
    assert (report.policy.episodes, report.random.episodes, report.repeat) == (6, 2, 3)
    found = sorted((e.fields["group"], e.fields["metadata"]["seed"]) for e in fake.episodes.values())
    assert found == [(f"{name or run.run_id}/seed-{seed}", seed) for seed in (7, 8) for _ in range(3)]


# --- environments of one's own

OWN = """
import gymnasium

class Coin(gymnasium.Env):
    observation_space = gymnasium.spaces.Text(20)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return "guess", {}

    def step(self, action):
        return "over", float(action), True, False, {}

gymnasium.register("Coin-v0", entry_point=Coin)
gymnasium.register("own/Coin-v0", entry_point=Coin)

class CoinText:
    instructions = "Heads or tails?"
    action_space = {"type": "discrete", "actions": ["heads", "tails"]}

    def __init__(self, env):
        assert isinstance(env.unwrapped, Coin)

    def observation(self, observation, info):
        return f"<{observation}>"

    def action(self, action):
        return ["heads", "tails"].index(action)

    def success(self, reward, terminated, truncated, episode_return):
        return reward > 0
"""


@pytest.mark.parametrize("env_id", ["Coin-v0", "own/Coin-v0"])
def test_an_environment_of_ones_own_is_named_by_its_module(
    fake: FakeService, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env_id: str
) -> None:
    (tmp_path / "coins_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    fake.choose = second_action
    command = ["--env", f"coins_of_a_test:{env_id}", "--episodes", "2", "--url", url, "--json"]
    plain = CliRunner().invoke(app, command)
    described = CliRunner().invoke(app, [*command, "--describe", "coins_of_a_test:CoinText"])
    assert (plain.exit_code, described.exit_code) == (0, 0), plain.stderr + described.stderr
    assert json.loads(plain.stdout)["completion_rate"] is None
    assert json.loads(described.stdout)["completion_rate"] == 1.0
    episodes = list(fake.episodes.values())
    assert episodes[0].acts[0][0]["observation"] == "guess"
    assert episodes[2].acts[0][0]["observation"] == "<guess>"
    assert episodes[2].fields["instructions"] == "Heads or tails?"
    assert {episode.fields["metadata"]["env"] for episode in episodes} == {env_id}


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


def test_intervals_are_right_for_two_episodes() -> None:
    summary = summarize([Outcome(0, 1.0, 1, True), Outcome(1, 3.0, 1, True)])
    # Student's t with one degree of freedom is 12.706.
    assert summary.mean_return_ci95 == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert summary.completion_rate_ci95 == pytest.approx((0.342, 1.0), abs=1e-3)
    alone = summarize([Outcome(0, 1.0, 1, None)])
    assert (alone.mean_return, alone.mean_return_ci95, alone.completion_rate_ci95) == (1.0, None, None)


def test_plays_of_one_seed_are_a_cluster_of_the_intervals() -> None:
    once = [Outcome(seed, float(seed % 3), 1, seed % 3 == 0) for seed in range(50)]
    repeated, alone = summarize(once * 4), summarize(once)
    assert repeated.mean_return_ci95 == pytest.approx(alone.mean_return_ci95)
    assert repeated.completion_rate_ci95 == pytest.approx(alone.completion_rate_ci95, abs=0.01)
    assert summarize(once[::-1]) == alone
