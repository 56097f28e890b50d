"""The results of a rollout: the outcome of each episode, and statistics over all of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from service.evaluation import statistics
from service.evaluation.statistics import Interval

Cut = Literal["parse_failure", "ended_by_service"]
"""`parse_failure`: the policy's text was not a valid action. `ended_by_service`: for example by `max_steps`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one episode. `length` is in steps of the environment.

    `success` is None if nothing defines it. `terminated` is whether the environment reached a final state. `cut` is the
    reason if the policy or the service ended the episode before the environment did.
    """

    seed: int
    episode_return: float
    length: int
    success: bool | None
    terminated: bool = False
    cut: Cut | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """An episode that could not be played to its end, and the error."""

    seed: int
    error: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics over the finished episodes of one policy. Without episodes, rates and means are None.

    The completion rate is that of the episodes whose success is known, and None if there are none. `success_unknown` is
    the number of the other episodes. `terminated` is the number of episodes that ended in a final state.
    """

    episodes: int
    completion_rate: float | None
    completion_rate_ci95: Interval | None
    success_unknown: int
    terminated: int
    mean_return: float | None
    mean_return_ci95: Interval | None
    mean_length: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """The results of a rollout.

    Durations are in seconds. Latencies of /act are measured at the client and include retries.
    """

    env: str
    run_id: str
    tag: str
    """The tag of the run's episodes."""
    seed: int
    num_seeds: int
    repeat: int
    """How often the policy played each seed."""
    concurrency: int
    temperature: float | None
    policy_version: str | None
    policy: Summary
    random: Summary
    steps_per_s: float
    p50_s: float | None
    p99_s: float | None
    wall_s: float
    ended_early: dict[Cut, int]
    """The number of the policy's episodes that ended before the environment did, by reason."""
    failures: tuple[Failure, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON: the policy's statistics at the top level, the random policy's under "random"."""
        own = {name: value for name, value in asdict(self).items() if name not in ("env", "policy", "random")}
        return {"env": self.env, **asdict(self.policy), **own, "random": asdict(self.random)}


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """The statistics over these outcomes. The plays of one seed are a cluster of the confidence intervals."""
    # Sorted, so that rounding does not depend on the order in which the episodes ended.
    outcomes = sorted(outcomes, key=lambda outcome: (outcome.seed, outcome.episode_return))
    known = [outcome for outcome in outcomes if outcome.success is not None]
    completion = statistics.rate(np.array([outcome.success for outcome in known], bool), _seeds(known))
    returns = statistics.mean(np.array([outcome.episode_return for outcome in outcomes], float), _seeds(outcomes))
    return Summary(
        episodes=len(outcomes),
        completion_rate=completion.rate,
        completion_rate_ci95=_interval(completion),
        success_unknown=len(outcomes) - len(known),
        terminated=sum(outcome.terminated for outcome in outcomes),
        mean_return=returns.mean,
        mean_return_ci95=_interval(returns),
        mean_length=fmean(outcome.length for outcome in outcomes) if outcomes else None,
    )


def _seeds(outcomes: Sequence[Outcome]) -> npt.NDArray[Any]:
    return np.array([outcome.seed for outcome in outcomes])


def _interval(estimate: statistics.Rate | statistics.Mean) -> Interval | None:
    return None if estimate.low is None or estimate.high is None else Interval(estimate.low, estimate.high)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile. None if there are no values."""
    return sorted(values)[max(0, ceil(len(values) * percent / 100) - 1)] if values else None
