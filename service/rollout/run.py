"""What the episodes of one rollout have in common: their labels and options, and what counts as a success."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from service.client import EpisodeFields
from service.environments import TextDescription

SUCCESS_KEYS = ("is_success", "success")
"""The keys of an environment's `info` that may define success, as in Gymnasium-Robotics and Meta-World."""


def new_run_id() -> str:
    """A new id that begins with the time, such as "20261127T021500-3fa91c"."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class Run:
    """The labels and options of a rollout's episodes.

    `instructions` replaces those of the environment's description. `profile` is a preset; its instructions and sampling
    are used unless `instructions` and `temperature` are given. `success_at` is the return from which an episode counts
    as a success.
    """

    tags: tuple[str, ...] = ()
    group: str | None = None
    policy: str | None = None
    profile: str | None = None
    instructions: str | None = None
    temperature: float | None = None
    success_at: float | None = None
    run_id: str = field(default_factory=new_run_id)

    @property
    def tag(self) -> str:
        """The tag of this run's episodes."""
        return f"run:{self.run_id}"

    def at(self, temperature: float | None) -> "Run":
        """The same run with this temperature; unchanged for None."""
        return self if temperature is None else replace(self, temperature=temperature)

    def fields(self, text: TextDescription, env_id: str, seed: int | None, group: str | None = None) -> EpisodeFields:
        """The fields of POST /episode for an episode with this seed. `group` replaces the run's group."""
        fields: EpisodeFields = {
            "action_space": text.action_space,
            "tags": ["rollout", self.tag, *self.tags],
            "metadata": {"env": env_id, "seed": seed},
        }
        if self.profile is not None:
            fields["profile"] = self.profile
        if self.policy is not None:
            fields["policy"] = self.policy
        if group or self.group:
            fields["group"] = group or self.group
        if self.instructions is not None or self.profile is None:
            fields["instructions"] = text.instructions if self.instructions is None else self.instructions
        if self.temperature is not None or self.profile is None:
            fields["sampling"] = {"temperature": self.temperature or 0.0}
        return fields

    def success(self, text: TextDescription, end: "End") -> bool | None:
        """Whether an episode that ended this way is a success, or None if nothing defines it.

        The first that defines it counts: `success_at`, the description, the environment's last `info`.
        """
        if self.success_at is not None:
            return end.episode_return >= self.success_at
        described = text.success(end.reward, end.terminated, end.truncated, end.episode_return)
        return _in_info(end.info) if described is None else described

    def success_of_cut(self, text: TextDescription, end: "End") -> bool | None:
        """The same for an episode that the policy or the service ended before the environment: never a success."""
        return None if self.success(text, end) is None else False


@dataclass(frozen=True, slots=True)
class End:
    """How an episode ended: what the environment returned last, and the sum of its rewards."""

    reward: float
    terminated: bool
    truncated: bool
    episode_return: float
    info: Mapping[str, Any]


def _in_info(info: Mapping[str, Any]) -> bool | None:
    for key in SUCCESS_KEYS:
        value = np.asarray(info.get(key))
        if value.size == 1 and value.dtype.kind in "biuf" and value.item() in (0, 1):
            return bool(value.item())
    return None
