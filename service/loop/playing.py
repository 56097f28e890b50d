"""Rollouts, exports, and comparisons on the same seeds."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.client import AsyncClient, Client, ConnectionFailed, Retry, Unavailable
from service.environments import describe
from service.evaluation import statistics
from service.files import complete_file
from service.filters import NO_RESULT
from service.loop import LearningFailed
from service.loop.plan import Metric, Plan
from service.rollout import EnvironmentFactory, Report, Run, rollout
from service.rollout.environment import load_description
from service.rollout.play import Player

_MAX_FAILED = 0.05
"""The share of failed episodes above which a rollout is of no use."""
_EXPORTS = 5

OnProgress = Callable[[int, int], None]
"""Called with the number of episodes that ended, and of all."""


@dataclass(frozen=True, slots=True)
class Service:
    """How to reach the service, and how many episodes to play at the same time."""

    url: str
    api_key: str | None = None
    retry_s: float = 600.0
    concurrency: int = 32

    def client(self) -> Client:
        return Client(self.url, self.api_key, retry=Retry(total_s=self.retry_s))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one episode."""

    seed: int
    success: bool | None
    episode_return: float


def factories(plan: Plan) -> tuple[EnvironmentFactory, EnvironmentFactory]:
    """The environments of training and of tests. Raises UnusableEnvironment."""
    describe_as = load_description(plan.describe) if plan.describe else describe
    in_tests = plan.env_kwargs if plan.test_kwargs is None else plan.test_kwargs
    made = tuple(
        EnvironmentFactory(plan.env, kwargs, plan.max_episode_steps, describe_as)
        for kwargs in (plan.env_kwargs, in_tests)
    )
    for factory in made:
        factory.make().env.close()
    return made[0], made[1]


def play(
    service: Service,
    factory: EnvironmentFactory,
    runs: Sequence[Run],
    seeds: range,
    repeat: int = 1,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Report]:
    """Plays the seeds in each run, all runs at the same time. Raises LearningFailed if many episodes fail."""
    done, total = 0, len(runs) * len(seeds) * repeat

    def count(player: Player) -> None:
        nonlocal done
        if player == "policy":
            done += 1
            on_progress(done, total)

    async def all_runs() -> list[Report]:
        numbers = {"episodes": len(seeds), "repeat": repeat, "seed": seeds.start}
        share = max(1, service.concurrency // len(runs))
        async with AsyncClient(service.url, service.api_key, retry=Retry(total_s=service.retry_s)) as client:
            return await asyncio.gather(
                *(rollout(factory, client, run=run, concurrency=share, on_episode=count, **numbers) for run in runs)
            )

    reports = asyncio.run(all_runs())
    for report in reports:
        _check(report, len(seeds) * repeat)
    return reports


def _check(report: Report, num_episodes: int) -> None:
    if len(report.failures) > _MAX_FAILED * num_episodes:
        raise LearningFailed(
            f"{len(report.failures)} of {num_episodes} episodes failed, for example: {report.failures[0].error}. "
            "Repeat the command to continue."
        )


def played(report: Report) -> dict[str, Any]:
    """The result of a rollout, for the state file."""
    names = ("episodes", "completion_rate", "completion_rate_ci95", "mean_return", "mean_return_ci95", "mean_length")
    own = {name: getattr(report, name) for name in ("run_id", "tag", "policy_version", "steps_per_s", "wall_s")}
    return {**own, **{name: getattr(report.policy, name) for name in names}, "failures": len(report.failures)}


def export(client: Client, tag: str, path: Path) -> int:
    """Writes the trajectories of a run to a file, which appears only when it is complete. Returns their number.

    An export that breaks off starts again.
    """
    for attempt in range(_EXPORTS):
        try:
            return _export(client, tag, path)
        except (ConnectionFailed, Unavailable):
            if attempt == _EXPORTS - 1:
                raise
            client.wait_ready()
    raise AssertionError("unreachable")


def _export(client: Client, tag: str, path: Path) -> int:
    count = 0
    with complete_file(path) as file:
        for document in client.export("tokens", tag=tag):
            file.write(json.dumps(document).encode() + b"\n")
            count += 1
    return count


def outcomes(client: Client, tag: str) -> list[Outcome]:
    """The results of a run's episodes, from the service."""
    return [
        Outcome(episode.metadata["seed"], episode.success, episode.episode_return)
        for episode in client.episodes(tag=tag, status="ended")
        if episode.metadata and episode.stop_reason not in NO_RESULT
    ]


def compare(candidate: Sequence[Outcome], baseline: Sequence[Outcome], metric: Metric) -> dict[str, Any]:
    """Compares two policies on the seeds that both have played. Raises LearningFailed."""
    kind = _kind([*candidate, *baseline], metric)
    a, b = _by_seed(candidate, kind), _by_seed(baseline, kind)
    shared = sorted(a.keys() & b.keys())
    values = [np.array([side[seed] for seed in shared], float) for side in (a, b)]
    compared = statistics.paired(values[0], values[1], kind=kind)
    return {
        "metric": kind,
        "candidate": _estimate(values[0], kind),
        "baseline": _estimate(values[1], kind),
        **asdict(compared),
        "verdict": statistics.verdict(compared, compared.p),
    }


def _kind(found: Sequence[Outcome], metric: Metric) -> statistics.Kind:
    is_known = all(outcome.success is not None for outcome in found)
    if metric == "completion" and not is_known:
        raise LearningFailed(
            "the success of some episodes is unknown. Define it with --success-at RETURN or --describe MODULE:CLASS, "
            "or use --metric return."
        )
    return "completion" if metric == "completion" or (metric == "auto" and is_known) else "return"


def _by_seed(found: Sequence[Outcome], kind: statistics.Kind) -> dict[int, float]:
    return {one.seed: float(bool(one.success)) if kind == "completion" else one.episode_return for one in found}


def _estimate(values: Any, kind: statistics.Kind) -> dict[str, Any]:
    if kind == "completion":
        rate = statistics.rate(values > 0)
        return {"value": rate.rate, "low": rate.low, "high": rate.high, "n": len(values)}
    mean = statistics.mean(values)
    return {"value": mean.mean, "low": mean.low, "high": mean.high, "n": len(values)}
