"""Summarizes the episodes of one group."""

from collections.abc import Sequence

import numpy as np

from service.evaluation import statistics
from service.evaluation.columns import REASONS, UNKNOWN, Episodes, Floats, Ints, Ratings
from service.evaluation.report import Group, Human, Length, Returns, Seconds, Tokens


def summarize(
    value: str | None, episodes: Episodes, ratings: Ratings, act_seconds: Sequence[float], level: float
) -> Group:
    """Returns the summary of a group.

    ratings: those of the group's episodes, with their places in `episodes`.
    act_seconds: of sampled acts.
    """
    ended, scored = episodes.at(episodes.has_result), episodes.at(episodes.is_scored)
    pass_at, pass_all = _repeats(scored)
    return Group(
        value=value,
        episodes=len(episodes.unit),
        ended=int(np.sum(episodes.reason != REASONS.index("active"))),
        excluded=_excluded(episodes),
        completion=statistics.rate(scored.success == 1, scored.unit, level),
        returns=_returns(ended, level),
        length=_length(ended.length),
        human=_human(episodes, ratings, level),
        pass_at=pass_at,
        pass_all=pass_all,
        parse_failures=_total(episodes.num_parse_failures),
        tokens=Tokens(int(np.sum(ended.num_tokens)), _mean(ended.num_tokens)),
        act_seconds=Seconds(*_quantiles(np.array(act_seconds), 0.5, 0.99)),
    )


def _excluded(episodes: Episodes) -> dict[str, int]:
    """Returns the number of episodes without a result by reason, and that of those whose success is unknown."""
    counts = {str(name): int(np.sum(episodes.reason == code)) for code, name in enumerate(REASONS) if code}
    counts["unscored"] = int(np.sum(episodes.has_result)) - int(np.sum(episodes.is_scored))
    return {name: count for name, count in counts.items() if count}


def _returns(ended: Episodes, level: float) -> Returns:
    mean = statistics.mean(ended.episode_return, ended.unit, level)
    middle = statistics.interquartile_mean(ended.episode_return, ended.unit, level)
    return Returns(
        mean=mean.mean,
        low=mean.low,
        high=mean.high,
        iqm=middle.iqm,
        iqm_low=middle.low,
        iqm_high=middle.high,
        sd=mean.sd,
        min=mean.min,
        max=mean.max,
        n=mean.n,
    )


def _length(lengths: Ints) -> Length:
    return Length(_mean(lengths), *_quantiles(lengths, 0.5, 0.95))


def _human(episodes: Episodes, ratings: Ratings, level: float) -> Human:
    places, rated = np.unique(ratings.place, return_inverse=True)
    means: Floats = np.bincount(rated, weights=ratings.rating) / np.bincount(rated) if len(places) else np.array([])
    mean = statistics.mean(means, episodes.unit[places], level)
    named = ratings.rater != UNKNOWN
    raters = len(np.unique(ratings.rater[named]))
    alpha = statistics.krippendorff_alpha(ratings.place[named], ratings.rater[named], ratings.rating[named])
    return Human(mean.mean, mean.low, mean.high, mean.n, raters, alpha)


def _repeats(scored: Episodes) -> tuple[dict[int, float] | None, dict[int, float] | None]:
    """Returns pass@k and pass^k for k = 1 and the most common number of plays of a seed, if this is more than 1.

    Forks are no plays of their own, because they share steps.
    """
    plays = scored.at((scored.is_seeded == 1) & (scored.is_fork == 0))
    _, unit, num_plays = np.unique(plays.unit, return_inverse=True, return_counts=True)
    num_successes = np.bincount(unit, weights=plays.success, minlength=len(num_plays)).astype(np.int64)
    k = _most_common(num_plays)
    if k < 2:
        return None, None
    numbers = {number: (num_plays, num_successes, number) for number in (1, k)}
    pass_at = {number: statistics.pass_at_k(*given) for number, given in numbers.items()}
    pass_all = statistics.pass_all_k(*numbers[k])
    assert pass_all is not None
    return {number: rate for number, rate in pass_at.items() if rate is not None}, {k: pass_all}


def _most_common(numbers: Ints) -> int:
    """Returns the most common number, the largest one of several; 0 if there is none."""
    counts = np.bincount(numbers) if len(numbers) else np.zeros(1)
    return len(counts) - 1 - int(np.argmax(counts[::-1]))


def _total(counts: Ints) -> int | None:
    known = counts[counts != UNKNOWN]
    return int(np.sum(known)) if len(known) or not len(counts) else None


def _mean(values: Ints) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _quantiles(values: Ints, *probabilities: float) -> list[float | None]:
    """Returns quantiles that are values of the sample (nearest rank); None for each if it is empty."""
    if not len(values):
        return [None] * len(probabilities)
    return [float(one) for one in np.quantile(values, probabilities, method="inverted_cdf")]
