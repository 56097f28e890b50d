"""The results of a rollout: the outcome of each episode, and statistics over all of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import fmean
from typing import Any, Literal

from service.rollout.intervals import Interval, mean_interval, wilson

Cut = Literal["the completion was not a valid action", "the service ended the episode"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one episode. `length` is in steps of the environment.

    `cut` is the reason if the policy or the service ended the episode before the environment did. Such an episode is
    not completed.
    """

    seed: int
    episode_return: float
    length: int
    completed: bool
    cut: Cut | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """An episode that could not be played to its end, and the error."""

    seed: int
    error: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics over the finished episodes of one policy. Without episodes, rates and means are None."""

    episodes: int
    completion_rate: float | None
    completion_rate_ci95: Interval | None
    mean_return: float | None
    mean_return_ci95: Interval | None
    mean_length: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """The results of a rollout.

    Durations are in seconds. Latencies of /act are measured at the client and include retries.
    """

    env: str
    seed: int
    concurrency: int
    temperature: float
    policy_version: str | None
    policy: Summary
    random: Summary
    steps_per_s: float
    p50_s: float | None
    p99_s: float | None
    wall_s: float
    cut: dict[Cut, int]
    """The number of the policy's episodes that were ended early, by reason."""
    failures: tuple[Failure, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON: the policy's statistics at the top level, the random policy's under "random"."""
        own = {name: value for name, value in asdict(self).items() if name not in ("env", "policy", "random")}
        return {"env": self.env, **asdict(self.policy), **own, "random": asdict(self.random)}


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """The statistics over these outcomes."""
    if not outcomes:
        return Summary(0, None, None, None, None, None)
    num_completed = sum(outcome.completed for outcome in outcomes)
    returns = [outcome.episode_return for outcome in outcomes]
    return Summary(
        episodes=len(outcomes),
        completion_rate=num_completed / len(outcomes),
        completion_rate_ci95=wilson(num_completed, len(outcomes)),
        mean_return=fmean(returns),
        mean_return_ci95=mean_interval(returns),
        mean_length=fmean(outcome.length for outcome in outcomes),
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile. None if there are no values."""
    return sorted(values)[max(0, ceil(len(values) * percent / 100) - 1)] if values else None
