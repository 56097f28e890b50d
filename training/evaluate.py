"""Evaluates a policy: plays the real Gymnasium environments greedily, without the service."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from service.environments import TextDescription, describe
from training.tokenizer import ASSISTANT, BEGIN, END, SYSTEM, USER
from training.worlds import Hand, hit_value, stick_value

HELD_OUT_SEED = 1_000_000
"""The first evaluation seed. Training uses no environment seeds, because it plays on tables."""

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "episodic/FrozenLakeRandom-v0": {"maps": "held_out"},
    "CliffWalking-v1": {"max_episode_steps": 100},
    "Taxi-v4": {},
    "Blackjack-v1": {},
}


@dataclass(slots=True)
class Episode:
    """One episode being played: the transcript that the policy sees, and the result so far."""

    env: gymnasium.Env[Any, Any]
    description: TextDescription
    token_ids: list[int]
    action_ids: dict[int, str]
    episode_return: float = 0.0
    num_steps: int = 0
    success: bool = False
    over: bool = field(default=False)


class Player:
    """Plays many episodes in lockstep with padded forward passes. Takes the action with the highest logit."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def play(self, env_id: str, seeds: Iterable[int], instructed: bool = True, **kwargs: Any) -> list[Episode]:
        """Plays one episode for each seed."""
        episodes = [self._start(gymnasium.make(env_id, **kwargs), seed, instructed) for seed in seeds]
        while running := [episode for episode in episodes if not episode.over]:
            for episode, action_id in zip(running, self._choose(running), strict=True):
                self._step(episode, action_id)
        return episodes

    def _start(self, env: gymnasium.Env[Any, Any], seed: int, instructed: bool) -> Episode:
        observation, info = env.reset(seed=seed)
        description = describe(env)
        actions = {self._encode(action)[0]: action for action in description.action_space["actions"]}
        token_ids = [self._id(BEGIN)]
        if instructed:
            token_ids += self._turn(SYSTEM, description.instructions)
        token_ids += [*self._turn(USER, description.observation(observation, info)), self._id(ASSISTANT)]
        return Episode(env, description, token_ids, actions)

    def _choose(self, episodes: list[Episode]) -> list[int]:
        """The token of each episode's greedy action. Equal transcripts are computed only once."""
        transcripts = list({tuple(episode.token_ids) for episode in episodes})
        logits: dict[tuple[int, ...], torch.Tensor] = {}
        for first in range(0, len(transcripts), 64):
            chunk = transcripts[first : first + 64]
            logits |= zip(chunk, self._next_logits(chunk), strict=True)
        return [
            max(episode.action_ids, key=lambda token: float(logits[tuple(episode.token_ids)][token]))
            for episode in episodes
        ]

    @torch.inference_mode()
    def _next_logits(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        longest = max(map(len, rows))
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self._model.model(input_ids=tokens, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
            return self._model.lm_head(last).float()

    def _step(self, episode: Episode, action_id: int) -> None:
        action = episode.description.action(episode.action_ids[action_id])
        observation, reward, terminated, truncated, info = episode.env.step(action)
        episode.episode_return += float(reward)
        episode.num_steps += 1
        episode.over = terminated or truncated
        if episode.over:
            episode.success = episode.description.success(float(reward), terminated, truncated, episode.episode_return)
            return
        text = episode.description.observation(observation, info)
        episode.token_ids += [action_id, self._id(END), *self._turn(USER, text), self._id(ASSISTANT)]

    def _turn(self, role: str, text: str) -> list[int]:
        return [self._id(role), *self._encode(text), self._id(END)]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _id(self, token: str) -> int:
        return self._tokenizer.convert_tokens_to_ids(token)


def basic_strategy_return(seeds: Iterable[int]) -> float:
    """The mean return of the optimal Blackjack policy (basic strategy) with the same seeds."""
    env = gymnasium.make("Blackjack-v1")
    returns: list[float] = []
    for seed in seeds:
        (player, dealer, ace), _ = env.reset(seed=seed)
        over, reward = False, 0.0
        while not over:
            hand: Hand = (player, dealer, bool(ace))
            (player, dealer, ace), reward, over, _, _ = env.step(int(hit_value(hand) > stick_value(hand)))
        returns.append(float(reward))
    return sum(returns) / len(returns)


def report(
    policy: Annotated[Path, typer.Argument(help="Folder of the policy.")] = Path("service/packaged/policies/toy-text"),
    num_episodes: Annotated[int, typer.Option("--episodes", min=1, help="Episodes of each environment.")] = 500,
    instructed: Annotated[bool, typer.Option(help="Add the environment's instructions as a system message.")] = True,
) -> None:
    """Play held-out episodes of each environment greedily and print a table of the results."""
    player = Player(AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy))
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + num_episodes)
    table = Table("environment", "episodes", "success", "mean return", "mean steps")
    for env_id, kwargs in ENVIRONMENTS.items():
        episodes = player.play(env_id, seeds, instructed, **kwargs)
        success = sum(episode.success for episode in episodes) / num_episodes
        mean_return = sum(episode.episode_return for episode in episodes) / num_episodes
        mean_steps = sum(episode.num_steps for episode in episodes) / num_episodes
        table.add_row(env_id, str(num_episodes), f"{success:.1%}", f"{mean_return:.3f}", f"{mean_steps:.2f}")
    console = Console()
    console.print(table)
    console.print(f"Blackjack, mean return of basic strategy with the same seeds: {basic_strategy_return(seeds):.3f}")


if __name__ == "__main__":
    typer.run(report)
