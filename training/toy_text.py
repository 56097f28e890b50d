"""Trains the packaged policy from scratch: `python -m training.toy_text`.

There are two stages on one learning rate schedule. Pretraining uses random play, with a loss on every token, so that
the model learns the texts and the dynamics of the worlds. Fine-tuning then uses the expert's action in every visited
state, with a loss on actions and on ends of turns. README.md explains the method.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from training import worlds
from training.curves import CSV, PLOT, Curves, Stage, plot
from training.data import Batch, Behaviour, Transcripts
from training.evaluate import Player
from training.model import export, new_model
from training.tokenizer import train_tokenizer

INSTRUCTED = 0.75
"""The fraction of batches with the system message."""

WARMUP = 0.02
"""The fraction of the schedule in which the learning rate rises."""

VALIDATION_SEED = 500_000

LAKE_WEIGHT = 0.7
"""FrozenLake's weight in the loss of an optimizer step."""


@dataclass(frozen=True, slots=True)
class Share:
    """The number and length of the episodes of one world in a batch."""

    transcripts: Transcripts
    num_episodes: int
    num_steps: int


def lake_share(tokenizer: PreTrainedTokenizerFast) -> Share:
    """FrozenLake's part of every optimizer step. It gets most of the compute, because it needs planning on new maps."""
    return Share(Transcripts(worlds.frozen_lake(), tokenizer), 20, 20)


def other_shares(tokenizer: PreTrainedTokenizerFast) -> list[Share]:
    """The other worlds, which have few states and can be memorized. Optimizer steps use them in rotation."""
    return [
        Share(Transcripts(worlds.taxi(), tokenizer), 5, 20),
        Share(Transcripts(worlds.blackjack(), tokenizer), 32, 2),
        Share(Transcripts(worlds.cliff_walking(), tokenizer), 4, 20),
    ]


def transcript_loss(model: LlamaForCausalLM, batch: Batch, pad: int) -> torch.Tensor:
    """The loss of pretraining: the mean cross-entropy over all tokens except padding."""
    tokens = torch.from_numpy(batch.tokens)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad)


def expert_loss(model: LlamaForCausalLM, batch: Batch, actions: torch.Tensor, end: int) -> torch.Tensor:
    """The loss of fine-tuning: the sum of two cross-entropies, averaged over all steps that took place.

    The first is that of the action token; its target is the expert's distribution over `actions` (token ids). The
    second is that of the token `end` after it.
    """
    action_at = torch.from_numpy(batch.action_at)
    tokens = torch.from_numpy(batch.tokens[:, : batch.action_at[-1] + 1])
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    act = model.lm_head(hidden[:, action_at - 1]).float().log_softmax(dim=-1)[..., actions]
    stop = model.lm_head(hidden[:, action_at]).float().log_softmax(dim=-1)[..., end]
    losses = -(torch.from_numpy(batch.labels) * act).sum(dim=-1) - stop
    alive = torch.from_numpy(batch.alive)
    return (losses * alive).sum() / alive.sum()


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "shared", "relative_attention_bias"))


class Optimizer:
    """Muon (Jordan, 2024) for the matrices of the layers and AdamW for embeddings and norms, with one schedule."""

    def __init__(self, model: PreTrainedModel, peak: float) -> None:
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and not _is_embedding(name)]
        outer = [p for name, p in model.named_parameters() if p.ndim != 2 or _is_embedding(name)]
        self._model = model
        self._peak = peak
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=peak, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, progress: float) -> None:
        """Updates the weights. `progress` (0 to 1) is the position in the schedule.

        The learning rate has a linear warm-up and then follows a cosine down to 2% of the peak.
        """
        cosine = 0.02 + 0.98 * (1 + np.cos(np.pi * progress)) / 2
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self._peak * min(1.0, progress / WARMUP + 0.01) * cosine
            part.step()
        self._model.zero_grad(set_to_none=True)


class Trainer:
    """The model, tokenizer, data and optimizer of a training run."""

    def __init__(self, seed: int, peak: float) -> None:
        torch.manual_seed(seed)
        self._rng = np.random.default_rng(seed)
        self.tokenizer = train_tokenizer(
            [worlds.frozen_lake(), worlds.cliff_walking(), worlds.taxi(), worlds.blackjack()]
        )
        self.model = new_model(self.tokenizer)
        self.num_tokens = 0
        self._lake = lake_share(self.tokenizer)
        self._others = other_shares(self.tokenizer)
        self._rotation = cycle(self._others)
        self._optimizer = Optimizer(self.model, peak)

    @property
    def worlds(self) -> list[str]:
        """The names of all worlds."""
        return [share.transcripts.world.name for share in (self._lake, *self._others)]

    def step(self, progress: float, stage: Stage) -> dict[str, float]:
        """One optimizer step over a batch of FrozenLake and a batch of another world. Returns the losses by world."""
        losses: dict[str, float] = {}
        for share, weight in ((self._lake, LAKE_WEIGHT), (next(self._rotation), 1 - LAKE_WEIGHT)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = self._loss(share, stage)
            (weight * loss).backward()
            losses[share.transcripts.world.name] = loss.item()
        self._optimizer.step(progress)
        return losses

    def _loss(self, share: Share, stage: Stage) -> torch.Tensor:
        behaviour: Behaviour = "random" if stage == "pretraining" else self._behaviour()
        instructed = bool(self._rng.random() < INSTRUCTED)
        batch = share.transcripts.sample(self._rng, share.num_episodes, share.num_steps, behaviour, instructed)
        self.num_tokens += batch.tokens.size
        if stage == "pretraining":
            return transcript_loss(self.model, batch, self.tokenizer.pad_token_id)
        actions = torch.from_numpy(share.transcripts.actions)
        return expert_loss(self.model, batch, actions, self.tokenizer.eos_token_id)

    def _behaviour(self) -> Behaviour:
        """How the episodes of a batch are played in fine-tuning: one batch in ten by the expert alone."""
        return "expert" if self._rng.random() < 0.1 else "explore"

    def validate(self, num_episodes: int) -> float:
        """The fraction of FrozenLake episodes on held-out maps that reach the goal.

        The seeds differ from those of the final evaluation.
        """
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + num_episodes)
        player = Player(self.model, self.tokenizer)
        # No shortest path has more than 12 steps. The low limit saves time, because an untrained policy wanders.
        episodes = player.play("episodic/FrozenLakeRandom-v0", seeds, maps="held_out", max_episode_steps=14)
        return sum(episode.success for episode in episodes) / num_episodes


def ticks(steps: int, minutes: float | None) -> Iterator[float]:
    """Yields the progress (0 to 1) before each optimizer step, measured in steps, or in time if `minutes` is given."""
    if minutes is None:
        yield from (step / steps for step in range(steps))
        return
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield progress


def train(
    out: Annotated[Path, typer.Option(help="Folder for the policy and the curves.")] = Path("training/out"),
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps.")] = 800,
    minutes: Annotated[float | None, typer.Option(help="Train for so many minutes, instead of for --steps.")] = None,
    pretrain: Annotated[float, typer.Option(min=0, max=1, help="Fraction of the schedule with random play.")] = 0.08,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    check_every: Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints.")] = 100,
    check_episodes: Annotated[int, typer.Option(min=1, help="Episodes that validate a checkpoint.")] = 64,
    final_episodes: Annotated[int, typer.Option(min=1, help="Episodes that validate the trained policy.")] = 500,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 2,
) -> None:
    """Train the packaged policy: pretrain on random play, then fine-tune on the expert's actions.

    Each checkpoint is validated on held-out FrozenLake maps."""
    torch.set_num_threads(threads)
    trainer = Trainer(seed, peak)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns) as bar, Curves(out / CSV, trainer.worlds) as curves:
        task = bar.add_task("training", total=1000)
        latest: dict[str, float] = {}
        for step, progress in enumerate(ticks(steps, minutes), start=1):
            stage: Stage = "pretraining" if progress < pretrain else "fine-tuning"
            losses = trainer.step(progress, stage)
            latest |= losses
            loss_text = " ".join(f"{name} {loss:.3f}" for name, loss in latest.items())
            bar.update(task, completed=int(1000 * progress), description=f"step {step} {loss_text}")
            reached = None
            if step % check_every == 0:
                reached = trainer.validate(check_episodes)
                figures = f"{trainer.num_tokens:,} tokens, loss {loss_text}, goal reached {reached:.0%}"
                bar.console.print(f"step {step}, {figures}")
                export(trainer.model, trainer.tokenizer, out / "checkpoint")
            curves.add(step, stage, trainer.num_tokens, losses, reached)
        bar.update(task, completed=1000)
        bar.console.print(
            f"goal reached on held-out maps: {trainer.validate(final_episodes):.1%} after {trainer.num_tokens:,} tokens"
        )
    export(trainer.model, trainer.tokenizer, out / "policy")
    plot(out / CSV, out / PLOT)


if __name__ == "__main__":
    typer.run(train)
