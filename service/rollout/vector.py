"""Plays a Gymnasium vector environment: one batch of acts for each step of all its copies."""

import logging
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import (
    AutoresetMode,
    SyncVectorEnv,
    VectorActionWrapper,
    VectorEnv,
    VectorObservationWrapper,
)
from gymnasium.vector.utils import concatenate, create_empty_array, iterate

from service.client import Act, ActFields, ApiError, BatchItem, Client, Episode
from service.environments import Describe, TextDescription, describe
from service.rollout.environment import RewardNotFinite, added
from service.rollout.run import End, Run

Info = dict[str, Any]

_log = logging.getLogger("episodic")


def play_vector(
    client: Client,
    envs: VectorEnv[Any, Any, Any],
    *,
    num_episodes: int,
    seed: int = 0,
    temperature: float | None = None,
    run: Run | None = None,
    describe: Describe = describe,
) -> Generator[float]:
    """Plays at least `num_episodes` episodes in the copies of an environment. Yields the return of each at its end.

    Episode i is reset with seed `seed` + i. `run` has the labels and options of the episodes; `temperature` replaces
    its temperature. `describe` creates the text description of a copy. Episodes that are still running at the end, or
    when the generator is closed, are truncated.

    `envs` is a SyncVectorEnv, or one in vector wrappers. It must be made with AutoresetMode.DISABLED, because a copy
    may be reset only after the service has received its last reward. If a policy's text is no action, or the service
    ends an episode, this episode is over. If an act fails or a reward is not finite, the episode is over, too: it is
    ended as `aborted`, the error is logged to the logger `episodic`, and no return is yielded.

    Raises ValueError for another vector environment, EpisodicError if a whole batch fails or an episode cannot be
    opened, and what the environment raises.
    """
    inner = envs.unwrapped
    if not isinstance(inner, SyncVectorEnv):
        raise ValueError(
            f"play_vector plays a SyncVectorEnv, not {type(inner).__name__}: use vectorization_mode='sync'"
        )
    if envs.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ValueError("make the environment with vector_kwargs={'autoreset_mode': AutoresetMode.DISABLED}")
    seeds, run = count(seed), (run or Run()).at(temperature)
    copies = [_as_seen(envs, env) for env in inner.envs]
    lanes = [_Lane(client, run, env, describe(env), next(seeds)) for env in copies]
    observations, infos = envs.reset(seed=cast(Any, [lane.seed for lane in lanes]))
    texts = _texts(envs, lanes, observations, infos)
    num_played = 0
    try:
        while num_played < num_episodes:
            acts = client.act_batch([lane.act(text) for lane, text in zip(lanes, texts, strict=True)])
            actions = [lane.action(act) for lane, act in zip(lanes, acts, strict=True)]
            observations, rewards, terminated, truncated, infos = envs.step(_batched(envs, actions))
            texts = _texts(envs, lanes, observations, infos)
            for i, lane in enumerate(lanes):
                lane.step(rewards[i], terminated[i], truncated[i], _info(infos, i))
            over = [i for i, lane in enumerate(lanes) if lane.is_over]
            if not over:
                continue
            _close(client, {lanes[i]: texts[i] for i in over if not lanes[i].is_cut})
            returns = [lanes[i].finish(next(seeds)) for i in over]
            num_played += len(over)
            yield from (finished for finished in returns if finished is not None)
            mask = np.array([i in over for i in range(len(lanes))])
            new_seeds = [lane.seed if is_over else None for lane, is_over in zip(lanes, mask, strict=True)]
            observations, infos = envs.reset(seed=cast(Any, new_seeds), options={"reset_mask": mask})
            for i, text in zip(over, _texts(envs, lanes, observations, infos, over), strict=True):
                texts[i] = text
    finally:
        for lane in lanes:
            lane.leave()


class _Lane:
    """One copy of the environment: its episode, which is opened on first use, and the fields of its next act."""

    def __init__(self, client: Client, run: Run, env: Any, text: TextDescription, seed: int) -> None:
        self.seed = seed
        self.text = text
        self.is_over = False
        self.is_cut = False
        """Whether the policy or the service ended the episode before the environment did."""
        self._has_failed = False
        self._client, self._run, self._env = client, run, env
        self._fields = ActFields()
        self._episode: Episode | None = None
        self._end = _START

    @property
    def episode(self) -> Episode:
        if self._episode is None:
            self._episode = self._client.episode(**self._run.fields(self.text, _env_id(self._env), self.seed))
        return self._episode

    def act(self, text: str) -> BatchItem[Episode]:
        """The copy's part of the next batch."""
        return self.episode, text, self._fields

    def check(self, result: Act | ApiError) -> Act | None:
        """The act, or None if it failed: then the episode is over, and the others go on."""
        if isinstance(result, Act):
            return result
        self._fail(result)
        return None

    def _fail(self, error: Exception) -> None:
        _log.warning("%s failed, and the others go on: %s", self.episode, error)
        self._has_failed = True

    def action(self, result: Act | ApiError) -> Any:
        """The environment's action. If there is none, the episode is cut, and any action is taken before the reset."""
        act = self.check(result)
        if act and not act.done and act.parse_failure is None:
            try:
                return self.text.action(act.action)
            except ValueError:
                pass
        self.is_cut = self.is_over = True
        return self._env.action_space.sample()

    def step(self, reward: Any, terminated: Any, truncated: Any, info: Info) -> None:
        """Records the environment's result for the last action."""
        if self.is_cut:
            self.leave()
            return
        self._fields = ActFields()  # the act has reported the reward before this one
        try:
            number, episode_return = added(self._end.episode_return, reward)
        except RewardNotFinite as error:
            self._fail(error)
            self.is_cut = self.is_over = True
            return
        self._end = End(number, bool(terminated), bool(truncated), episode_return, info)
        self._fields["reward"] = number
        if terminated or truncated:
            self.is_over = True
            self._fields.update(terminated=self._end.terminated, truncated=self._end.truncated)
            self._fields["success"] = self._run.success(self.text, self._end)

    def finish(self, next_seed: int) -> float | None:
        """Returns the return of the episode that ended, or None if it failed. Prepares for the next one."""
        finished = None if self._has_failed else self._end.episode_return
        self.leave()
        self._episode, self._fields, self._end, self.seed = None, ActFields(), _START, next_seed
        self.is_over = self.is_cut = self._has_failed = False
        return finished

    def leave(self) -> None:
        """Ends the episode if it is still running. Reports its last reward, unless an act has reported it."""
        if self._episode is None or self._episode.done:
            return
        with suppress(ApiError):  # for example, somebody deleted the episode
            if self._has_failed:
                self._episode.end(reward=self._fields.get("reward"))
            elif self.is_cut:
                self._episode.end(truncated=True, success=self._run.success_of_cut(self.text, self._end))
            else:
                self._episode.end(reward=self._fields.get("reward"), truncated=True)


_START = End(0.0, False, False, 0.0, {})


class _Seen(gymnasium.ObservationWrapper[Any, Any, Any]):
    """A copy as the vector wrappers show it."""

    def __init__(self, env: Any, envs: Any) -> None:
        super().__init__(env)
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space

    def observation(self, observation: Any) -> Any:
        return observation


def _close(client: Client, lanes: dict[_Lane, str]) -> None:
    """Ends the lanes' episodes by an act with the last observation."""
    results = client.act_batch([lane.act(text) for lane, text in lanes.items()])
    for lane, result in zip(lanes, results, strict=True):
        lane.check(result)


def _as_seen(envs: Any, env: Any) -> Any:
    """A copy with the spaces that its observations and actions have outside of the vector wrappers."""
    outer: Any = envs
    while outer is not envs.unwrapped:
        if isinstance(outer, VectorObservationWrapper | VectorActionWrapper):
            return _Seen(env, envs)
        outer = outer.env
    return env


def _env_id(env: Any) -> str:
    return env.spec.id if env.spec else type(env.unwrapped).__name__


def _batched(envs: Any, actions: Sequence[Any]) -> Any:
    """The copies' actions as one action of the vector environment."""
    space = envs.single_action_space
    return concatenate(space, actions, cast(Any, create_empty_array(space, len(actions))))


def _texts(
    envs: Any, lanes: list[_Lane], observations: Any, infos: Any, which: Sequence[int] | None = None
) -> list[str]:
    """The texts of the copies' observations, in order. `which` are the indices of the copies to describe."""
    each = list(iterate(envs.observation_space, observations))
    chosen = range(len(lanes)) if which is None else which
    return [lanes[i].text.observation(each[i], _info(infos, i)) for i in chosen]


def _info(infos: Any, i: int) -> Info:
    """The info of one copy.

    For each key, a vector environment stores the copies' values in an array or, for nested infos, in a dict of arrays,
    and under `_key` which copies have the key. Wrappers may add keys without `_key`, values that all copies share, or
    turn the infos into a list.
    """
    if isinstance(infos, list):
        return cast(Any, infos)[i]
    own: Info = {}
    for key, values in infos.items():
        is_mask = key.startswith("_") and key[1:] in infos
        mask = infos.get(f"_{key}")
        if not is_mask and (mask is None or mask[i]):
            own[key] = _value(values, i)
    return own


def _value(values: Any, i: int) -> Any:
    if isinstance(values, dict):
        return _info(cast(Any, values), i)
    array: Any = values
    return array[i] if isinstance(values, list | tuple) or np.ndim(array) else array
