"""The interface of the store: the `Store` protocol, its exceptions, and the changes that a commit can contain."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from service.filters import By, EpisodeFilter, Order, Sort
from service.trajectory import Catalog, EpisodeState, Feedback, Step, StoredEpisode, StoredKey, StoredVersion
from service.values import immutable


class StepTaken(Exception):
    """The commit does not follow the stored steps: another caller committed this step, or the episode has ended.

    Or the episode was deleted, and another one has its id.
    """


class EpisodeExists(Exception):
    """An episode or a tombstone with this id already exists."""


class EpisodeGone(Exception):
    """The episode to fork or to rate was deleted."""


class StoreUnavailable(Exception):
    """The store cannot be reached or cannot write. Read again to find out whether a change was stored."""

    code: ClassVar = "store_unavailable"


class StoreRefused(Exception):
    """The store cannot be used, and a retry does not help. The message says why and what to do."""


@immutable
class Commit:
    """The change that one act makes: the new step, and the state of the episode after it.

    opened_at: when the episode was opened. It tells the episode from another one with the same id; None for any.
    """

    step: Step
    state: EpisodeState
    opened_at: float | None = None


Change = StoredEpisode | Commit
"""A change that can share a transaction with others: a new episode or an act."""


EVERY = EpisodeFilter()
"""Matches every episode."""

Place = tuple[float, str] | tuple[float, float, str]
"""Where an episode stands in a sorted list: the value that it is sorted by, unless this is the time of creation, the
time of creation, and the id. No two episodes have the same place."""


@immutable
class Ordering:
    """How a list of episodes is sorted. Episodes with the same value are sorted by time of creation, then by id."""

    sort: Sort = "created"
    order: Order = "desc"

    @property
    def unrated(self) -> float:
        """Stands for the rating of an episode without one. Ratings are from 1 to 5, so it is last in either order."""
        return 0.0 if self.order == "desc" else 6.0

    def place(self, listed: StoredEpisode) -> Place:
        """Returns the place of an episode that `Store.episodes` returned with this ordering."""
        created = (listed.config.created_at, listed.config.episode_id)
        match self.sort:
            case "created":
                return created
            case "return":
                return (listed.state.episode_return, *created)
            case "length":
                return (float(listed.state.step), *created)
            case "rating":
                return (self.unrated if listed.rating is None else listed.rating, *created)


NEWEST_FIRST = Ordering()
OLDEST_FIRST = Ordering(order="asc")


class Outcome(NamedTuple):
    """What an evaluation reads of one episode. A named tuple, because it is made for each of very many episodes.

    value: what the episodes are grouped by; None if the episode has none, or if they are grouped by tag.
    root: id of the episode that stores the first step of this one: its own, or that of the ancestor of a fork.
    num_parse_failures, num_recorded: as in `EpisodeState`.
    """

    episode_id: str
    created_at: float
    parent_id: str | None
    value: str | None
    env: str | None
    seed: str | None
    policy_version: str
    status: str
    stop_reason: str | None
    success: int | None
    episode_return: float
    step: int
    num_tokens: int
    num_parse_failures: int | None
    num_recorded: int | None
    root: str


@immutable
class OutcomePage:
    """Outcomes of several episodes, oldest first.

    tags: the tags of the episodes by id, if they are grouped by tag.
    ratings: of whole episodes, by episode id: pairs of rater and rating.
    """

    outcomes: Sequence[Outcome]
    tags: Mapping[str, Sequence[str]]
    ratings: Mapping[str, Sequence[tuple[str | None, int]]]


class StepSample(NamedTuple):
    """What an evaluation reads of one step: how long the act took, in seconds, and the temperature; None if unknown."""

    episode_id: str
    seconds: float | None
    temperature: float | None


KEPT_MOVES = 20
"""Number of versions in the history of an alias, the current one included."""


class Store(Protocol):
    """Stores episodes and what belongs to them. Episode ids are qualified by the tenant; times are Unix seconds.

    Every method but `close` raises StoreUnavailable if the store cannot be used.
    """

    async def open(self) -> None:
        """Connects and migrates the schema to the newest revision. Raises StoreRefused."""
        ...

    async def close(self) -> None:
        """Writes the pending changes and disconnects."""
        ...

    async def create(self, record: StoredEpisode) -> None:
        """Adds an episode. Raises EpisodeExists."""
        ...

    async def episode(self, episode_id: str) -> StoredEpisode | None:
        """Returns the episode, its tombstone if it was deleted, or None."""
        ...

    async def fork(self, records: Sequence[StoredEpisode]) -> None:
        """Adds forks of one episode, all or none. `config.parent` of each names the parent and the branch point: a fork
        shares the parent's steps before it. Raises EpisodeExists, EpisodeGone."""
        ...

    async def episodes(
        self,
        *,
        limit: int,
        before: Place | None,
        tenant: str | None = None,
        where: EpisodeFilter = EVERY,
        ordering: Ordering = NEWEST_FIRST,
    ) -> list[StoredEpisode]:
        """Returns a page of episodes, without tombstones.

        limit: maximum number of episodes.
        before: place of the last episode of the previous page (keyset pagination); None for the first page.
        tenant: only episodes of this tenant; None for all tenants.
        where: only episodes that match this filter. A label may be a tuple, of which one text must match.
        ordering: how the list is sorted. The mean rating is returned only if the list is sorted by it.
        """
        ...

    async def outcomes(
        self, *, limit: int, after: Place | None, tenant: str, where: EpisodeFilter = EVERY, by: By
    ) -> OutcomePage:
        """Returns a page of outcomes, without those of tombstones.

        limit: maximum number of episodes.
        after: place of the last episode of the previous page: its time of creation, and its id.
        where: only episodes that match this filter. A label may be a tuple, of which one text must match.
        by: what `Outcome.value` or `OutcomePage.tags` is read from.
        """
        ...

    async def step_samples(self, episode_ids: Sequence[str], num_steps: int) -> list[StepSample]:
        """Returns the steps of these episodes that have an index below `num_steps`, without the steps that a fork
        shares with its ancestors. The steps of an episode are in their order."""
        ...

    async def commit(self, commit: Commit) -> None:
        """Stores an act; it is durable when this returns. Raises StepTaken unless the episode is active, has exactly
        `step.index` steps, and was opened at `opened_at`."""
        ...

    async def steps(self, episode_id: str, index: int | None = None) -> list[Step]:
        """Returns the episode's steps in order, including those shared with ancestors and the closing step. With
        `index`, returns only that step, or an empty list."""
        ...

    async def trajectory(
        self, episode_id: str, first: int = 0, last: int | None = None
    ) -> tuple[StoredEpisode, list[Step]] | None:
        """Returns the episode and its steps from one consistent snapshot, or None.

        first, last: only the steps with an index in this range, both included. `last` None: to the end.
        """
        ...

    async def next_expiry(self) -> float | None:
        """Returns the earliest expiry time of an active episode, or None."""
        ...

    async def expired(self, now: float, limit: int) -> list[str]:
        """Returns the ids of at most `limit` active episodes that expired by `now`, earliest expiry first."""
        ...

    async def add_feedback(self, feedback: Feedback) -> Feedback:
        """Adds a rating. It replaces the rating that the same named rater gave for the same step. Raises EpisodeGone.

        Returns the stored rating: that of the episode with the same idempotency key, if there is one, which then stays
        unchanged.
        """
        ...

    async def feedback(self, episode_id: str) -> list[Feedback]:
        """Returns the episode's ratings, oldest first."""
        ...

    async def put_version(self, version: StoredVersion, *, move_alias: bool) -> StoredVersion:
        """Adds a version of an adapter. If it exists, replaces the parts of its lineage that are not None.

        move_alias: also lets the alias of this name point to the version, and adds it to the alias's history.

        Returns the version as it is stored.
        """
        ...

    async def roll_back(self, name: str) -> StoredVersion | None:
        """Lets the alias point to the version before the current one, which leaves its history. Returns that version;
        None if there is no alias or no earlier version."""
        ...

    async def delete_alias(self, name: str) -> bool:
        """Deletes the alias and its history. The versions stay. Returns False if there is no such alias."""
        ...

    async def set_default_policy(self, policy: str | None) -> None:
        """Chooses the policy of new episodes that name none; None leaves it to the settings."""
        ...

    async def remove_unused_versions(self, keep: Sequence[str] = ()) -> list[StoredVersion]:
        """Removes the versions that no active episode uses, and that neither an alias, nor its history, nor the default
        policy, nor a name of `keep` (`name@digest`) refers to. Returns them."""
        ...

    async def catalog(self) -> Catalog:
        """Returns the stored policies."""
        ...

    async def catalog_marks(self) -> object:
        """Returns a small value that differs whenever the catalog differs in more than lineage."""
        ...

    async def num_active(self, tenant: str | None = None) -> int:
        """Returns the number of episodes that have not ended, of one tenant or of all."""
        ...

    async def add_key(self, key: StoredKey) -> None: ...

    async def revoke_key(self, key_id: str, at: float) -> bool:
        """Marks a key as revoked. Returns False if the key does not exist or is already revoked."""
        ...

    async def keys(self) -> list[StoredKey]:
        """Returns all API keys, including revoked ones, in the order of their creation."""
        ...

    async def delete(self, episode_id: str) -> bool:
        """Replaces the episode with a tombstone. Its steps are deleted once no fork reads them. Returns False if there
        was nothing to delete."""
        ...

    async def delete_ended(self, ended_before: float, limit: int) -> list[str]:
        """Deletes at most `limit` episodes that ended before this time. Returns their ids; none if nothing is left."""
        ...

    async def remove_tombstones(self, deleted_before: float, limit: int) -> int:
        """Removes at most `limit` tombstones of episodes that were deleted before this time, and returns their number.

        A tombstone stays as long as a fork reads steps of its episode. Ids of removed tombstones can be used again.
        """
        ...
