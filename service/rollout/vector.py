"""Owns the playing of a vectorised environment: one batch of acts for each step of all its copies."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import iterate

from service.client import Act, ApiError, Client, Episode
from service.client.calls import ActFields
from service.environments import TextDescription, describe
from service.rollout.environment import finite

Info = dict[str, Any]


def play_vector(
    client: Client, envs: SyncVectorEnv, *, num_episodes: int, seed: int = 0, temperature: float = 0.0
) -> Iterator[float]:
    """Plays at least `num_episodes` episodes in copies of one environment and yields each one's return as it ends.

    `envs` must be made with AutoresetMode.DISABLED: its copies are reset here, when the service has heard of their last
    reward. Raises ApiError for an act that the service refuses, ValueError for another autoreset mode.
    """
    if envs.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ValueError("make the environment with vector_kwargs={'autoreset_mode': AutoresetMode.DISABLED}")
    texts: list[TextDescription] = [describe(env) for env in envs.envs]
    episodes = [_begin(client, text, temperature) for text in texts]
    returns = np.zeros(envs.num_envs)
    observations, infos = envs.reset(seed=seed)
    fields = [ActFields() for _ in texts]
    num_played = 0
    while num_played < num_episodes:
        shown = list(_shown(envs, texts, observations, infos))
        acts = _acted(client.act_batch(list(zip(episodes, shown, fields, strict=True))))
        actions = [text.action(act.action) for text, act in zip(texts, acts, strict=True)]
        observations, rewards, terminated, truncated, infos = envs.step(np.asarray(actions))
        returns += rewards
        fields = [ActFields(reward=finite(reward)) for reward in rewards]
        over = terminated | truncated
        if not over.any():
            continue
        last = list(_shown(envs, texts, observations, infos))
        ended: list[tuple[Episode, str, ActFields]] = []
        for i in map(int, np.flatnonzero(over)):
            ending = ActFields(reward=finite(rewards[i]), terminated=bool(terminated[i]), truncated=bool(truncated[i]))
            ending["success"] = texts[i].success(
                float(rewards[i]), bool(terminated[i]), bool(truncated[i]), float(returns[i])
            )
            ended.append((episodes[i], last[i], ending))
        _acted(client.act_batch(ended))
        observations, infos = envs.reset(options={"reset_mask": over})
        for i in map(int, np.flatnonzero(over)):
            num_played += 1
            yield float(returns[i])
            returns[i], fields[i], episodes[i] = 0.0, ActFields(), _begin(client, texts[i], temperature)
    for episode in episodes:
        episode.end(truncated=True)


def _begin(client: Client, text: TextDescription, temperature: float) -> Episode:
    space = text.action_space
    sampling = {"temperature": temperature}
    return client.episode(instructions=text.instructions, action_space=space, sampling=sampling, tags=["rollout"])


def _shown(envs: SyncVectorEnv, texts: list[TextDescription], observations: Any, infos: Info) -> Iterator[str]:
    space: Any = getattr(envs, "observation_space")  # noqa: B009 - untyped in part
    for i, (text, observation) in enumerate(zip(texts, iterate(space, observations), strict=True)):
        yield text.observation(observation, _info(infos, i))


def _info(infos: Info, i: int) -> Info:
    """What belongs to one copy: a vector environment marks under _key which copies gave a key."""
    return {key: values[i] for key, values in infos.items() if not key.startswith("_") and infos[f"_{key}"][i]}


def _acted(results: list[Act | ApiError]) -> list[Act]:
    for result in results:
        if isinstance(result, ApiError):
            raise result
    return [result for result in results if isinstance(result, Act)]
