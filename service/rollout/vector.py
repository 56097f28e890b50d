"""Plays a Gymnasium vector environment: one batch of acts for each step of all its copies."""

from collections.abc import Generator, Sequence
from itertools import count
from typing import Any, cast

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate

from service.client import Act, ActFields, ApiError, BatchItem, Client, Episode
from service.environments import Describe, TextDescription, describe
from service.rollout.environment import finite
from service.rollout.run import End, Run

Info = dict[str, Any]


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
    ends an episode, this episode is over. Raises ValueError for another vector environment, and ApiError if an act
    fails.
    """
    inner = envs.unwrapped
    if not isinstance(inner, SyncVectorEnv):
        raise ValueError(
            f"play_vector plays a SyncVectorEnv, not {type(inner).__name__}: use vectorization_mode='sync'"
        )
    if envs.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ValueError("make the environment with vector_kwargs={'autoreset_mode': AutoresetMode.DISABLED}")
    seeds, run = count(seed), (run or Run()).at(temperature)
    lanes = [_Lane(client, run, env, describe(env), next(seeds)) for env in inner.envs]
    observations, infos = envs.reset(seed=cast(Any, [lane.seed for lane in lanes]))
    texts = _texts(envs, lanes, observations, infos)
    num_played = 0
    try:
        while num_played < num_episodes:
            acts = _act_all(client, [lane.act(text) for lane, text in zip(lanes, texts, strict=True)])
            actions = [lane.action(act) for lane, act in zip(lanes, acts, strict=True)]
            observations, rewards, terminated, truncated, infos = envs.step(_batched(envs, actions))
            texts = _texts(envs, lanes, observations, infos)
            for i, lane in enumerate(lanes):
                lane.step(rewards[i], terminated[i], truncated[i], _info(infos, i))
            over = [i for i, lane in enumerate(lanes) if lane.is_over]
            if not over:
                continue
            _act_all(client, [lanes[i].act(texts[i]) for i in over if not lanes[i].is_cut])
            for i in over:
                num_played += 1
                yield lanes[i].finish(next(seeds))
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

    def action(self, act: Act) -> Any:
        """The environment's action. If there is none, the episode is cut, and any action is taken before the reset."""
        if not act.done and act.parse_failure is None:
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
        number = finite(reward)
        self._end = End(number, bool(terminated), bool(truncated), self._end.episode_return + number, info)
        self._fields = ActFields(reward=number)
        if terminated or truncated:
            self.is_over = True
            self._fields.update(terminated=self._end.terminated, truncated=self._end.truncated)
            self._fields["success"] = self._run.success(self.text, self._end)

    def finish(self, next_seed: int) -> float:
        """Returns the return of the episode that ended, and prepares for the next one."""
        finished = self._end.episode_return
        self._episode, self._fields, self._end, self.seed = None, ActFields(), _START, next_seed
        self.is_over = self.is_cut = False
        return finished

    def leave(self) -> None:
        """Truncates the episode if it is still running. Reports its last reward, unless an act has reported it."""
        if self._episode is None or self._episode.done:
            return
        if self.is_cut:
            self._episode.end(truncated=True, success=self._run.success_of_cut(self.text, self._end))
        else:
            self._episode.end(reward=self._fields.get("reward"), truncated=True)


_START = End(0.0, False, False, 0.0, {})


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


def _act_all(client: Client, acts: Sequence[BatchItem[Episode]]) -> list[Act]:
    results = client.act_batch(acts)
    for result in results:
        if isinstance(result, ApiError):
            raise result
    return [result for result in results if isinstance(result, Act)]
