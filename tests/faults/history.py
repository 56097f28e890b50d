"""Owns what the runner remembers of an episode: what it sent, to the byte, and what it was answered."""

import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from service.client import Act, calls
from service.client.calls import Call

Completions = dict[int, tuple[int, ...]]
"""The token ids that the policy drew, by step."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One message as it can be sent again: by the step's index or, where there is a key, by an Idempotency-Key."""

    step: int
    observation: str
    reward: float | None
    key: str | None = None
    recorded: Any = None
    """Somebody else's action; the policy is not asked."""
    terminated: bool = False

    @property
    def fields(self) -> Any:
        """What goes with the observation."""
        reward = {} if self.reward is None else {"reward": self.reward}
        return {**reward, "terminated": True} if self.terminated else reward

    def call(self, episode_id: str) -> Call[Act]:
        if self.recorded is not None:
            return calls.record(episode_id, self.step, self.observation, self.recorded, self.fields)
        if self.key is None:
            return calls.act(episode_id, self.step, self.observation, self.fields)
        body = {"episode_id": episode_id, "observation": self.observation, **self.fields}
        return Keyed("POST", "/act", _read, episode_id, calls.encode(body), key=self.key)


@dataclass(frozen=True)
class Keyed(Call[Act]):
    """An act that an Idempotency-Key identifies; the client sends it again with the same one."""

    key: str = ""

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        request = super().request(http)
        request.headers["Idempotency-Key"] = self.key
        return request


def _read(response: httpx.Response) -> Act:
    return Act.model_validate_json(response.content)


@dataclass(frozen=True, slots=True)
class Taken:
    """An acknowledged step."""

    sent: Sent
    answer: Act


@dataclass(slots=True)
class History:
    """An episode as its caller knows it. A fork's begins with its parent's steps."""

    episode_id: str
    space: str
    steps: list[Taken] = field(default_factory=list)
    first_own: int = 0
    """The first step that is not its parent's."""
    closing: Taken | None = None
    ended_with: float | None = None
    """The reward of POST /episode/{id}/end, if that ended it."""
    completions: Completions = field(default_factory=dict)
    """As they were when they were first read: they may not change."""
    prefix: list[int] = field(default_factory=list)
    """The episode's tokens when they were last read: more may only follow."""

    @property
    def ended(self) -> bool:
        return self.closing is not None or self.ended_with is not None

    @property
    def rewards(self) -> list[float]:
        """What the messages after the first brought, each for the action before it."""
        closing = None if self.closing is None else self.closing.sent.reward
        brought = [*(step.sent.reward for step in self.steps), closing, self.ended_with]
        return [reward for reward in brought if reward is not None]

    def say(self, generator: random.Random, **fields: Any) -> Sent:
        """The next message. No two of an episode have the same observation, so none can stand in for another; rewards
        are binary fractions, so their sum is exact."""
        step = len(self.steps)
        where = f"row {generator.randrange(4)}, column {generator.randrange(4)}"
        reward = generator.randrange(1024) / 1024 if step else None
        return Sent(step, f"{where}, move {step}", reward, **fields)

    def take(self, sent: Sent, answer: Act) -> None:
        if answer.done:
            self.closing = Taken(sent, answer)
        else:
            self.steps.append(Taken(sent, answer))

    def fork(self, episode_id: str, at_step: int) -> "History":
        shared = {step: ids for step, ids in self.completions.items() if step < at_step}
        return History(episode_id, self.space, self.steps[:at_step], at_step, completions=shared)
