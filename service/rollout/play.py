"""Owns the playing of episodes: by the service's policy, many at a time, and by a random one, here."""

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
"""Called after each episode, whoever played it."""

SLOW_STEP_S = 0.002
"""An environment slower than this steps in a thread: inline it would hold up the other episodes' requests."""


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
    """Plays `episodes` episodes, the one of index i reset with seed `seed` + i, at most `concurrency` at a time.

    An episode that the service fails, or whose reward is not finite, is a failure in the report; what the environment
    raises, it raises here. Raises UnusableEnvironment before anything is played.
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
    todo = iter(seeds)  # shared: whichever worker is free takes the next
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(_work(games, worker, todo, on_episode))


async def _work(games: "_Games", worker: TextEnvironment, todo: Iterator[int], on_episode: OnEpisode) -> None:
    for seed in todo:
        await games.play(worker, seed)
        on_episode("policy")


@dataclass(slots=True)
class _Games:
    """Episodes played by the service's policy, and what is measured about them."""

    client: AsyncClient
    env_id: str
    temperature: float
    in_threads: bool
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    failures: list[Failure] = field(default_factory=list[Failure])
    latencies_s: list[float] = field(default_factory=list[float])
    policy_version: str | None = None

    async def play(self, worker: TextEnvironment, seed: int) -> None:
        """One episode. A failing one is data: the rest go on."""
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
            shown = text.observation(observation, info)
            if terminated or truncated:
                success = text.success(reward, terminated, truncated, episode_return)
                await episode.act(shown, reward=reward, terminated=terminated, truncated=truncated, success=success)
                return Outcome(seed, episode_return, length, success)
            act = await self._act(episode, shown, reward)
        if act.done:
            return Outcome(seed, episode_return, length, False, "the service ended the episode")
        await episode.end(truncated=True, success=False)
        return Outcome(seed, episode_return, length, False, "the completion was no action")

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
    """A uniformly random policy's episodes, and the seconds that one step of the environment takes."""
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for seed in seeds:
        outcomes.append(random_episode(worker, seed))
        on_episode("random")
        await asyncio.sleep(0)  # lets a cancellation in
    return outcomes, (time.perf_counter() - began) / sum(outcome.length for outcome in outcomes)


def random_episode(worker: TextEnvironment, seed: int) -> Outcome:
    """One episode of actions drawn from the action space, which is seeded as the environment is."""
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
