"""Plays a Gymnasium vector environment: one batch of acts for each step of all its copies."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import iterate

from service.client import Act, ActFields, ApiError, BatchItem, Client, Episode
from service.environments import TextDescription, describe
from service.rollout.environment import finite

Info = dict[str, Any]


def play_vector(
    client: Client, envs: SyncVectorEnv, *, num_episodes: int, seed: int = 0, temperature: float = 0.0
) -> Generator[float]:
    """Plays at least `num_episodes` episodes in the copies of an environment. Yields the return of each at its end.

    Episodes that are still running then, or when the generator is closed, are truncated.

    `envs` must be made with AutoresetMode.DISABLED, because a copy may be reset only after the service has received its
    last reward. Raises ValueError for another autoreset mode, and ApiError if an act fails.
    """
    if envs.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ValueError("make the environment with vector_kwargs={'autoreset_mode': AutoresetMode.DISABLED}")
    lanes = [_Lane(client, describe(env), temperature) for env in envs.envs]
    observations, infos = envs.reset(seed=seed)
    num_played = 0
    try:
        while num_played < num_episodes:
            texts = _describe_all(envs, lanes, observations, infos)
            items = [(lane.episode, text, lane.fields) for lane, text in zip(lanes, texts, strict=True)]
            acts = _act_all(client, items)
            actions = [lane.text.action(act.action) for lane, act in zip(lanes, acts, strict=True)]
            observations, rewards, terminated, truncated, infos = envs.step(np.asarray(actions))
            for lane, *outcome in zip(lanes, rewards, terminated, truncated, strict=True):
                lane.step(*outcome)
            over = terminated | truncated
            if not over.any():
                continue
            last = _describe_all(envs, lanes, observations, infos)
            ended = [(lane, text) for lane, text, is_over in zip(lanes, last, over, strict=True) if is_over]
            _act_all(client, [(lane.episode, text, lane.fields) for lane, text in ended])
            observations, infos = envs.reset(options={"reset_mask": over})
            for lane, _ in ended:
                num_played += 1
                yield lane.finish()
    finally:
        for lane in lanes:
            lane.leave()


class _Lane:
    """One copy of the environment: its episode, which is opened on first use, and the fields of its next act."""

    def __init__(self, client: Client, text: TextDescription, temperature: float) -> None:
        self.text = text
        self.fields = ActFields()
        self._client, self._temperature = client, temperature
        self._episode: Episode | None = None
        self._return = 0.0

    @property
    def episode(self) -> Episode:
        if self._episode is None:
            self._episode = self._client.episode(
                instructions=self.text.instructions,
                action_space=self.text.action_space,
                sampling={"temperature": self._temperature},
                tags=["rollout"],
            )
        return self._episode

    def step(self, reward: Any, terminated: Any, truncated: Any) -> None:
        """Records the environment's result for the last action."""
        self._return += float(reward)
        self.fields = ActFields(reward=finite(reward))
        if terminated or truncated:
            self.fields.update(terminated=bool(terminated), truncated=bool(truncated))
            self.fields["success"] = self.text.success(float(reward), bool(terminated), bool(truncated), self._return)

    def finish(self) -> float:
        """Returns the return of the episode that ended, and prepares for the next one."""
        finished, self._return = self._return, 0.0
        self._episode, self.fields = None, ActFields()
        return finished

    def leave(self) -> None:
        """Truncates the episode if it is still running, and reports its last reward."""
        if self._episode is not None and not self._episode.done:
            self._episode.end(reward=self.fields.get("reward"), truncated=True)


def _describe_all(envs: SyncVectorEnv, lanes: list[_Lane], observations: Any, infos: Info) -> list[str]:
    space: Any = getattr(envs, "observation_space")  # noqa: B009 - untyped in part
    each = enumerate(zip(lanes, iterate(space, observations), strict=True))
    return [lane.text.observation(observation, _info(infos, i)) for i, (lane, observation) in each]


def _info(infos: Info, i: int) -> Info:
    """The info of one copy. For each key, the vector environment stores under `_key` which copies have it."""
    return {key: values[i] for key, values in infos.items() if not key.startswith("_") and infos[f"_{key}"][i]}


def _act_all(client: Client, acts: Sequence[BatchItem[Episode]]) -> list[Act]:
    results = client.act_batch(acts)
    for result in results:
        if isinstance(result, ApiError):
            raise result
    return [result for result in results if isinstance(result, Act)]
