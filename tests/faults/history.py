"""An episode from its caller's view: the exact messages that it sent, and the answers that it received."""

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
    """A message that can be sent again. The step's index or, if set, the Idempotency-Key `key` identifies it."""

    step: int
    observation: str
    reward: float | None
    key: str | None = None
    recorded: Any = None
    """An action that the caller chose instead of the policy."""
    terminated: bool = False

    @property
    def fields(self) -> Any:
        """The fields of the message other than the observation."""
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
    """An act with an Idempotency-Key. A retry sends the same key."""

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
    """An episode as its caller knows it. The history of a fork starts with the steps of its parent."""

    episode_id: str
    space: str
    steps: list[Taken] = field(default_factory=list)
    first_own: int = 0
    """Index of the first step that does not come from the parent."""
    closing: Taken | None = None
    ended_with: float | None = None
    """The reward in POST /episode/{id}/end, if that call ended the episode."""
    completions: Completions = field(default_factory=dict)
    """The drawn tokens, as they were first read. They must not change."""
    prefix: list[int] = field(default_factory=list)
    """The episode's tokens, as they were last read. Later tokens may only be appended."""

    @property
    def ended(self) -> bool:
        return self.closing is not None or self.ended_with is not None

    @property
    def rewards(self) -> list[float]:
        """The rewards that the messages after the first one sent, each for the previous action."""
        closing = None if self.closing is None else self.closing.sent.reward
        sent = [*(step.sent.reward for step in self.steps), closing, self.ended_with]
        return [reward for reward in sent if reward is not None]

    def say(self, generator: random.Random, **fields: Any) -> Sent:
        """Returns the next message.

        Every message of an episode has another observation, so that the checker can tell them apart. The rewards are
        binary fractions, so that their sum is exact.
        """
        step = len(self.steps)
        where = f"row {generator.randrange(4)}, column {generator.randrange(4)}"
        reward = generator.randrange(1024) / 1024 if step else None
        return Sent(step, f"{where}, move {step}", reward, **fields)

    def take(self, sent: Sent, answer: Act) -> None:
        """Adds an answered message."""
        if answer.done:
            self.closing = Taken(sent, answer)
        else:
            self.steps.append(Taken(sent, answer))

    def fork(self, episode_id: str, at_step: int) -> "History":
        shared = {step: ids for step, ids in self.completions.items() if step < at_step}
        return History(episode_id, self.space, self.steps[:at_step], at_step, completions=shared)
