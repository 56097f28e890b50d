"""Plays episodes with the service's policy, many at the same time, and with a random policy for comparison."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from service.client import Act, AsyncClient, AsyncEpisode, EpisodicError
from service.rollout.environment import EnvironmentFactory, RewardNotFinite, TextEnvironment, finite
from service.rollout.report import Failure, Outcome, Report, percentile, summarize

Player = Literal["random", "policy"]
OnEpisode = Callable[[Player], None]
"""Called after each episode with the player that played it."""

SLOW_STEP_S = 0.002
"""An environment slower than this runs in threads. In the event loop it would delay the other episodes' requests."""


def ignore(player: Player) -> None:
    """An `OnEpisode` that does nothing."""


async def rollout(
    factory: EnvironmentFactory,
    client: AsyncClient,
    *,
    episodes: int = 200,
    concurrency: int = 32,
    seed: int = 0,
    temperature: float = 0.0,
    on_episode: OnEpisode = ignore,
) -> Report:
    """Plays `episodes` episodes with each player, at most `concurrency` of the policy's at the same time.

    Episode i is reset with seed `seed` + i. An episode with a failed call or with a reward that is not finite is
    reported as a failure. Errors that the environment raises are raised here. Raises UnusableEnvironment before any
    episode is played.
    """
    seeds = range(seed, seed + episodes)
    first = factory.make()
    random, step_s = await _play_random(first, seeds, on_episode)
    workers = [first, *(factory.make() for _ in range(min(concurrency, episodes) - 1))]
    games = _Games(client, factory.env_id, temperature, in_threads=step_s > SLOW_STEP_S)
    began = time.perf_counter()
    await _play_all(games, workers, seeds, on_episode)
    wall_s = time.perf_counter() - began
    for worker in workers:
        worker.env.close()
    return Report(
        env=factory.env_id,
        seed=seed,
        concurrency=concurrency,
        temperature=temperature,
        policy_version=games.policy_version,
        policy=summarize(games.outcomes),
        random=summarize(random),
        steps_per_s=len(games.latencies_s) / wall_s,
        p50_s=percentile(games.latencies_s, 50),
        p99_s=percentile(games.latencies_s, 99),
        wall_s=wall_s,
        cut=dict(Counter(outcome.cut for outcome in games.outcomes if outcome.cut is not None)),
        failures=tuple(sorted(games.failures, key=lambda failure: failure.seed)),
    )


async def _play_all(games: "_Games", workers: list[TextEnvironment], seeds: range, on_episode: OnEpisode) -> None:
    todo = iter(seeds)  # the workers share the iterator: each takes the next seed when it is free
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(_work(games, worker, todo, on_episode))


async def _work(games: "_Games", worker: TextEnvironment, todo: Iterator[int], on_episode: OnEpisode) -> None:
    for seed in todo:
        await games.play(worker, seed)
        on_episode("policy")


@dataclass(slots=True)
class _Games:
    """Plays episodes with the service's policy and collects the measurements."""

    client: AsyncClient
    env_id: str
    temperature: float
    in_threads: bool
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    failures: list[Failure] = field(default_factory=list[Failure])
    latencies_s: list[float] = field(default_factory=list[float])
    policy_version: str | None = None

    async def play(self, worker: TextEnvironment, seed: int) -> None:
        """Plays one episode. A failure is recorded and does not stop the other episodes."""
        try:
            self.outcomes.append(await self._play(worker, seed))
        except (EpisodicError, RewardNotFinite) as error:
            self.failures.append(Failure(seed, f"{type(error).__name__}: {error}"))

    async def _play(self, worker: TextEnvironment, seed: int) -> Outcome:
        env, text = worker.env, worker.text
        observation, info = await self._in_env(env.reset, seed=seed)
        episode = await self._begin(worker, seed)
        act = await self._act(episode, text.observation(observation, info), None)
        length, episode_return = 0, 0.0
        while not act.done and act.parse_failure is None:
            observation, raw, terminated, truncated, info = await self._in_env(env.step, text.action(act.action))
            reward = finite(raw)
            length, episode_return = length + 1, episode_return + reward
            described = text.observation(observation, info)
            if terminated or truncated:
                success = text.success(reward, terminated, truncated, episode_return)
                await episode.act(described, reward=reward, terminated=terminated, truncated=truncated, success=success)
                return Outcome(seed, episode_return, length, success)
            act = await self._act(episode, described, reward)
        if act.done:
            return Outcome(seed, episode_return, length, False, "the service ended the episode")
        await episode.end(truncated=True, success=False)
        return Outcome(seed, episode_return, length, False, "the completion was not a valid action")

    async def _begin(self, worker: TextEnvironment, seed: int) -> AsyncEpisode:
        return await self.client.episode(
            instructions=worker.text.instructions,
            action_space=worker.text.action_space,
            sampling={"temperature": self.temperature},
            tags=["rollout"],
            metadata={"env": self.env_id, "seed": seed},
        )

    async def _act(self, episode: AsyncEpisode, observation: str, reward: float | None) -> Act:
        began = time.perf_counter()
        act = await episode.act(observation, reward=reward)
        self.latencies_s.append(time.perf_counter() - began)
        self.policy_version = act.policy_version
        return act

    async def _in_env(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(function, *args, **kwargs) if self.in_threads else function(*args, **kwargs)


async def _play_random(worker: TextEnvironment, seeds: range, on_episode: OnEpisode) -> tuple[list[Outcome], float]:
    """Plays all episodes with a uniformly random policy. Also returns the mean time of a step in seconds."""
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for seed in seeds:
        outcomes.append(random_episode(worker, seed))
        on_episode("random")
        await asyncio.sleep(0)  # gives the event loop a chance to deliver a cancellation
    return outcomes, (time.perf_counter() - began) / sum(outcome.length for outcome in outcomes)


def random_episode(worker: TextEnvironment, seed: int) -> Outcome:
    """Plays one episode with actions sampled from the action space. The same seed sets environment and sampling."""
    env = worker.env
    env.action_space.seed(seed)
    env.reset(seed=seed)
    length, episode_return = 0, 0.0
    while True:
        _, raw, terminated, truncated, _ = env.step(env.action_space.sample())
        reward = finite(raw)
        length, episode_return = length + 1, episode_return + reward
        if terminated or truncated:
            completed = worker.text.success(reward, terminated, truncated, episode_return)
            return Outcome(seed, episode_return, length, completed)
