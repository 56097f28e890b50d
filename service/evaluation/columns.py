"""Collects the outcomes of many episodes in columns, about 100 bytes for each, and the groups that they belong to."""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import Unprocessable
from service.filters import NO_RESULT
from service.store.base import Outcome, OutcomePage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]

MAX_EPISODES = 1_000_000
MAX_GROUPS = 1_000
_MAX_SAMPLE = 128
"""Maximum number of episodes of a group whose steps may be sampled."""
REASONS = (None, "active", *NO_RESULT)
"""Why an episode has no result; None if it has one."""
UNKNOWN = -1


class Sample:
    """Some episodes of a group, spread evenly over all of them in the order of their creation."""

    __slots__ = ("_kept", "_num_seen", "_stride")

    def __init__(self) -> None:
        self._kept: list[tuple[str, int]] = []
        self._num_seen = 0
        self._stride = 1

    def add(self, episode_id: str, num_steps: int) -> None:
        if self._num_seen % self._stride == 0:
            self._kept.append((episode_id, num_steps))
            if len(self._kept) > _MAX_SAMPLE:
                del self._kept[1::2]
                self._stride *= 2
        self._num_seen += 1

    def within(self, num_steps: int) -> list[str]:
        """Returns the ids of as many episodes as have about this number of steps together, at least of one."""
        kept = self._kept
        while len(kept) > 1 and sum(length for _, length in kept) > num_steps:
            kept = kept[::2]
        return [episode_id for episode_id, _ in kept]


@dataclass(slots=True)
class Members:
    """The episodes of a group: their places in the columns."""

    _places: "array[int]" = field(default_factory=lambda: array("i"))
    sample: Sample = field(default_factory=Sample)

    def add(self, place: int, outcome: Outcome) -> None:
        self._places.append(place)
        self.sample.add(outcome.episode_id, outcome.step)

    @property
    def places(self) -> Ints:
        return np.asarray(self._places)


class Codes:
    """Numbers distinct values from 0 in the order in which they appear."""

    def __init__(self) -> None:
        self._codes: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        return self._codes.setdefault(value, len(self._codes))


class Units:
    """Numbers what was played: each (env, seed), or each family of forks if there is no seed.

    Episodes of one unit depend on each other.
    """

    def __init__(self) -> None:
        self._seeds: defaultdict[str | None, dict[str, int]] = defaultdict(dict)
        self._roots: dict[str, int] = {}
        self._num = 0

    def __call__(self, env: str | None, seed: str | None, root: str) -> int:
        codes, name = (self._roots, root) if seed is None else (self._seeds[env], seed)
        code = codes.setdefault(name, self._num)
        self._num += code == self._num
        return code


class Columns:
    """The outcomes of all selected episodes.

    group_of: the name of an episode's group for its `Outcome.value`.
    """

    def __init__(self, group_of: Callable[[str | None], str | None]) -> None:
        self.groups: defaultdict[str | None, Members] = defaultdict(Members)
        self._group_of = group_of
        self._columns: dict[str, array[Any]] = {name: array(kind) for name, kind in _KINDS.items()}
        self._unit, self._env, self._version, self._rater = Units(), Codes(), Codes(), Codes()
        self._rated: dict[str, array[Any]] = {name: array(kind) for name, kind in _RATING_KINDS.items()}

    def __len__(self) -> int:
        return len(self._columns["unit"])

    def add(self, page: OutcomePage, *, by_tag: bool) -> None:
        """Adds a page of outcomes. Raises Unprocessable if there are too many episodes or groups."""
        outcomes = page.outcomes
        if not outcomes:
            return
        first = len(self)
        if first + len(outcomes) > MAX_EPISODES:
            raise Unprocessable(
                f"more than {MAX_EPISODES:,} episodes match, which is too many for one evaluation. Select fewer with "
                "filters, for example since.",
                "query",
            )
        for name, values in self._values(outcomes).items():
            self._columns[name].extend(values)
        for place, outcome in enumerate(outcomes, first):
            values = (page.tags.get(outcome.episode_id) or (None,)) if by_tag else (self._group_of(outcome.value),)
            for value in values:
                self.groups[value].add(place, outcome)
            for rater, rating in page.ratings.get(outcome.episode_id, ()):
                self._rate(place, rater, rating)
        if len(self.groups) > MAX_GROUPS:
            detail = (
                f"query parameter 'by': the selected episodes have more than {MAX_GROUPS:,} values. Select fewer "
                "episodes with filters, or use another 'by'."
            )
            raise Unprocessable(detail, "query", "by")

    def _values(self, outcomes: Sequence[Outcome]) -> dict[str, Iterable[Any]]:
        """Returns the new values of each column."""
        columns: Any = Outcome(*zip(*outcomes, strict=True))  # type: ignore[arg-type] - columns instead of values
        return {
            "unit": map(self._unit, columns.env, columns.seed, columns.root),
            "is_seeded": (seed is not None for seed in columns.seed),
            "is_fork": (parent is not None for parent in columns.parent_id),
            "env": map(self._env, columns.env),
            "version": map(self._version, columns.policy_version),
            "reason": map(_reason, columns.status, columns.stop_reason),
            "success": map(_known, columns.success),
            "episode_return": columns.episode_return,
            "length": columns.step,
            "num_tokens": columns.num_tokens,
            "num_parse_failures": map(_known, columns.num_parse_failures),
            "num_recorded": map(_known, columns.num_recorded),
        }

    def _rate(self, place: int, rater: str | None, rating: int) -> None:
        self._rated["place"].append(place)
        self._rated["rater"].append(UNKNOWN if rater is None else self._rater(rater))
        self._rated["rating"].append(rating)

    @property
    def episodes(self) -> "Episodes":
        """The columns as arrays, without a copy. No page may be added after this."""
        return Episodes(**{name: np.asarray(column) for name, column in self._columns.items()})

    @property
    def ratings(self) -> "Ratings":
        """The ratings as arrays, without a copy. No page may be added after this."""
        return Ratings(**{name: np.asarray(column) for name, column in self._rated.items()})


_KINDS = {
    "unit": "i",
    "is_seeded": "b",
    "is_fork": "b",
    "env": "i",
    "version": "i",
    "reason": "b",
    "success": "b",
    "episode_return": "d",
    "length": "i",
    "num_tokens": "i",
    "num_parse_failures": "i",
    "num_recorded": "i",
}
"""The columns and their type codes of the module array."""
_RATING_KINDS = {"place": "i", "rater": "i", "rating": "d"}


@dataclass(frozen=True, slots=True)
class Episodes:
    """Columns with one element for each episode. -1 stands for an unknown value.

    unit: number of what was played; see `Units`.
    env, version: number of the environment and of the policy version.
    reason: index in `REASONS`.
    success: 1, 0, or -1.
    """

    unit: Ints
    is_seeded: Ints
    is_fork: Ints
    env: Ints
    version: Ints
    reason: Ints
    success: Ints
    episode_return: Floats
    length: Ints
    num_tokens: Ints
    num_parse_failures: Ints
    num_recorded: Ints

    def at(self, places: "Ints | Flags") -> "Episodes":
        """Returns the episodes at these places."""
        return Episodes(*(getattr(self, field.name)[places] for field in fields(self)))

    @property
    def has_result(self) -> Flags:
        """Whether the episode ended with an outcome of its environment."""
        return self.reason == 0

    @property
    def is_scored(self) -> Flags:
        """Whether the episode has a result, and its success is known."""
        return self.has_result & (self.success != UNKNOWN)


@dataclass(frozen=True, slots=True)
class Ratings:
    """Ratings of whole episodes: the place of the episode, the number of the rater (-1: no name), and the rating."""

    place: Ints
    rater: Ints
    rating: Floats


def _known(value: int | None) -> int:
    return UNKNOWN if value is None else value


def _reason(status: str, stop_reason: str | None) -> int:
    reason = "active" if status == "active" else stop_reason
    return REASONS.index(reason) if reason in REASONS else 0
