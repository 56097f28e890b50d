"""Plays episodes with the service's policy, many at the same time, and with a random policy for comparison."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from service.client import Act, ActFields, ApiError, AsyncClient, AsyncEpisode, EpisodicError
from service.rollout.acting import Acting
from service.rollout.environment import EnvironmentFactory, TextEnvironment, UnusableEnvironment, added
from service.rollout.report import Cut, Failure, Outcome, Report, percentile, summarize
from service.rollout.run import End, Run

Player = Literal["random", "policy"]
OnEpisode = Callable[[Player], None]
"""Called after each episode with the player that played it."""

SLOW_STEP_S = 0.002
"""An environment slower than this runs in threads. In the event loop it would delay the other episodes' requests."""

_ABANDON_S = 10.0
"""Timeout in seconds for ending an episode that cannot be continued."""

_REFUSED_STATUS = frozenset({400, 401, 403, 404, 413, 422})


class EpisodeRefused(Exception):
    """The service refuses to open an episode, for example because of its action space. It would refuse all others."""


def ignore(player: Player) -> None:
    """An `OnEpisode` that does nothing."""


async def rollout(
    factory: EnvironmentFactory,
    client: AsyncClient,
    *,
    episodes: int = 200,
    repeat: int = 1,
    concurrency: int = 32,
    seed: int = 0,
    temperature: float | None = None,
    run: Run | None = None,
    on_episode: OnEpisode = ignore,
) -> Report:
    """Plays `episodes` seeds with each player, at most `concurrency` of the policy's episodes at the same time.

    Discrete acts that are ready at the same time share a request.

    The seeds are `seed`, `seed` + 1, ... The policy plays each of them `repeat` times; these plays share a group. The
    random policy plays each once. `run` has the labels and options of the episodes; `temperature` replaces its
    temperature.

    An episode with a failed call, with an error in the environment or with a reward that is not finite is reported as a
    failure, and ended. Raises UnusableEnvironment if no episode can be played, also with the random policy, and
    EpisodeRefused if the service refuses to open an episode.
    """
    run = (run or Run()).at(temperature)
    seeds = range(seed, seed + episodes)
    games = _games(seeds, repeat, run)
    first = factory.make()
    random, step_s, failures = await _play_random(first, factory.name, run, seeds, on_episode)
    workers = [first, *(factory.make() for _ in range(min(concurrency, len(games)) - 1))]
    is_discrete = first.text.action_space["type"] == "discrete"  # then all acts take about as long
    acting = Acting(client, len(workers)) if is_discrete else None
    players = _Players(client, factory.name, run, acting, in_threads=step_s > SLOW_STEP_S, failures=failures)
    began = time.perf_counter()
    await _play_all(players, workers, games, on_episode)
    wall_s = time.perf_counter() - began
    for worker in workers:
        worker.env.close()
    return Report(
        env=factory.name,
        run_id=run.run_id,
        tag=run.tag,
        seed=seed,
        num_seeds=episodes,
        repeat=repeat,
        concurrency=concurrency,
        temperature=0.0 if run.temperature is None and run.profile is None else run.temperature,
        policy_version=players.policy_version,
        policy=summarize(players.outcomes),
        random=summarize(random),
        steps_per_s=len(players.latencies_s) / wall_s,
        p50_s=percentile(players.latencies_s, 50),
        p99_s=percentile(players.latencies_s, 99),
        wall_s=wall_s,
        ended_early=dict(Counter(outcome.cut for outcome in players.outcomes if outcome.cut is not None)),
        failures=tuple(sorted(players.failures, key=lambda failure: failure.seed)),
    )


@dataclass(frozen=True, slots=True)
class _Game:
    """An episode to play. `group` replaces the run's group."""

    seed: int
    group: str | None


def _games(seeds: range, repeat: int, run: Run) -> list[_Game]:
    if repeat == 1:
        return [_Game(seed, None) for seed in seeds]
    name = run.group or run.run_id
    return [_Game(seed, f"{name}/seed-{seed}") for seed in seeds for _ in range(repeat)]


async def _play_all(
    players: "_Players", workers: list[TextEnvironment], games: Sequence[_Game], on_episode: OnEpisode
) -> None:
    todo = iter(games)  # the workers share the iterator: each takes the next game when it is free
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(_work(players, worker, todo, on_episode))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _work(players: "_Players", worker: TextEnvironment, todo: Iterator[_Game], on_episode: OnEpisode) -> None:
    for game in todo:
        await players.play(worker, game)
        on_episode("policy")


@dataclass(slots=True)
class _Players:
    """Plays episodes with the service's policy and collects the measurements."""

    client: AsyncClient
    env_id: str
    run: Run
    acting: Acting | None
    """Sends the acts, unless each one is a request of its own."""
    in_threads: bool
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    failures: list[Failure] = field(default_factory=list[Failure])
    latencies_s: list[float] = field(default_factory=list[float])
    policy_version: str | None = None

    async def play(self, worker: TextEnvironment, game: _Game) -> None:
        """Plays one episode. A failure is recorded and does not stop the other episodes."""
        try:
            self.outcomes.append(await self._play(worker, game))
        except EpisodeRefused:
            raise
        except Exception as error:  # noqa: BLE001 - an error in one episode, also of its environment, spoils no other
            self.failures.append(Failure(game.seed, _named(error)))

    async def _play(self, worker: TextEnvironment, game: _Game) -> Outcome:
        observation, info = await self._in_env(worker.env.reset, seed=game.seed)
        episode = await self._begin(worker, game)
        try:
            return await self._take_steps(worker, episode, game.seed, observation, info)
        finally:
            if not episode.done:
                await self._abandon(episode)

    async def _take_steps(
        self, worker: TextEnvironment, episode: AsyncEpisode, seed: int, observation: Any, info: Any
    ) -> Outcome:
        env, text = worker.env, worker.text
        end = End(0.0, False, False, 0.0, info)
        length = 0
        act = await self._act(episode, text.observation(observation, info), None)
        while not act.done and (action := _action(worker, act)) is not None:
            observation, raw, terminated, truncated, info = await self._in_env(env.step, action.value)
            reward, episode_return = added(end.episode_return, raw)
            length += 1
            end = End(reward, bool(terminated), bool(truncated), episode_return, info)
            described = text.observation(observation, info)
            if terminated or truncated:
                success = self.run.success(text, end)
                closing = ActFields(reward=reward, success=success)
                closing |= ActFields(terminated=end.terminated, truncated=end.truncated)
                await self._send(episode, described, closing)
                return Outcome(seed, end.episode_return, length, success, end.terminated)
            act = await self._act(episode, described, reward)
        success = self.run.success_of_cut(text, end)
        cut: Cut = "ended_by_service" if act.done else "parse_failure"
        if not act.done:
            await episode.end(truncated=True, success=success)
        return Outcome(seed, end.episode_return, length, success, cut=cut)

    async def _begin(self, worker: TextEnvironment, game: _Game) -> AsyncEpisode:
        """Opens an episode. If it is cancelled meanwhile, waits for the answer and ends the episode."""
        opening = asyncio.create_task(self._open(worker, game))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            with suppress(EpisodicError, EpisodeRefused, TimeoutError):
                async with asyncio.timeout(_ABANDON_S):
                    await self._abandon(await opening)
            raise

    async def _open(self, worker: TextEnvironment, game: _Game) -> AsyncEpisode:
        try:
            return await self.client.episode(**self.run.fields(worker.text, self.env_id, game.seed, game.group))
        except ApiError as error:
            if error.status not in _REFUSED_STATUS:
                raise
            raise EpisodeRefused(f"the service refuses to open an episode of {self.env_id}: {error}") from error

    async def _act(self, episode: AsyncEpisode, observation: Any, reward: float | None) -> Act:
        began = time.perf_counter()
        act = await self._send(episode, observation, ActFields(reward=reward))
        self.latencies_s.append(time.perf_counter() - began)
        self.policy_version = act.policy_version
        return act

    async def _send(self, episode: AsyncEpisode, observation: Any, fields: ActFields) -> Act:
        if self.acting is None:
            return await episode.act(observation, **fields)
        return await self.acting.act(episode, observation, fields)

    async def _abandon(self, episode: AsyncEpisode) -> None:
        """Ends an episode that cannot be continued, so that it does not stay active for ever."""
        with suppress(EpisodicError, TimeoutError):
            async with asyncio.timeout(_ABANDON_S):
                while not episode.done:
                    try:
                        await episode.end()
                    except ApiError as error:
                        if error.code != "episode_busy":
                            raise
                        await asyncio.sleep(0.1)  # the service is still aborting the act in flight

    async def _in_env(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(function, *args, **kwargs) if self.in_threads else function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Action:
    """An action of the environment, which may be any value."""

    value: Any


def _action(worker: TextEnvironment, act: Act) -> _Action | None:
    """The environment's action for an act, or None if what the policy wrote is no action of the environment."""
    if act.parse_failure is not None:
        return None
    try:
        return _Action(worker.text.action(act.action))
    except ValueError:
        return None


async def _play_random(
    worker: TextEnvironment, env_id: str, run: Run, seeds: range, on_episode: OnEpisode
) -> tuple[list[Outcome], float, list[Failure]]:
    """Plays all episodes with a uniformly random policy. Also returns the mean time of a step in seconds."""
    outcomes: list[Outcome] = []
    failures: list[Failure] = []
    began = time.perf_counter()
    for seed in seeds:
        try:
            outcomes.append(random_episode(worker, run, seed))
        except Exception as error:
            failures.append(Failure(seed, f"random policy: {_named(error)}"))
            if len(failures) == len(seeds):
                raise UnusableEnvironment(f"{env_id}: {_named(error)}") from error
        on_episode("random")
        await asyncio.sleep(0)  # gives the event loop a chance to deliver a cancellation
    return outcomes, (time.perf_counter() - began) / sum(outcome.length for outcome in outcomes), failures


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def random_episode(worker: TextEnvironment, run: Run, seed: int) -> Outcome:
    """Plays one episode with actions sampled from the action space. The same seed sets environment and sampling."""
    env = worker.env
    env.action_space.seed(seed)
    env.reset(seed=seed)
    length, episode_return = 0, 0.0
    while True:
        _, raw, terminated, truncated, info = env.step(env.action_space.sample())
        reward, episode_return = added(episode_return, raw)
        length += 1
        if terminated or truncated:
            end = End(reward, bool(terminated), bool(truncated), episode_return, info)
            return Outcome(seed, episode_return, length, run.success(worker.text, end), end.terminated)
