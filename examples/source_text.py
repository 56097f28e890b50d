"""The agent loop that every text on agents begins with: observe, decide, act, until the episode is over.

Here the decisions are those of an encoder-decoder model behind `make serve MODEL=toy-t5`. The profile `source-text`
gives the model "Observation: ..." and nothing else.
"""

import gymnasium

from episodic import Client
from episodic.environments import describe

env = gymnasium.make("CliffWalking-v1", max_episode_steps=100)
text = describe(env)
with Client() as client:
    episode = client.episode(profile="source-text", action_space=text.action_space, sampling={"temperature": 0})
    observation, info = env.reset(seed=7)
    reward, terminated, truncated = None, False, False
    while not (terminated or truncated):
        act = episode.act(text.observation(observation, info), reward=reward)
        print(f"{text.observation(observation, info)}: {act.action}")
        observation, reward, terminated, truncated, info = env.step(text.action(act.action))
    ended = episode.end(reward=reward, terminated=terminated, truncated=truncated, success=terminated)
    print("return", ended.episode_return)
