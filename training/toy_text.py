"""Trains the packaged policy from scratch: `python -m training.toy_text`.

Two stages on one schedule: pretraining on random play (loss on every token, so that the model learns the text and the
worlds' dynamics), then fine-tuning on the expert's action in every visited state (loss on actions and ends of turns).
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
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from training import worlds
from training.data import Batch, Behaviour, Transcripts
from training.evaluate import Player
from training.model import export, new_model
from training.tokenizer import train_tokenizer

INSTRUCTED = 0.75
"""The share of batches with the system message."""

WARMUP = 0.02
"""The share of the schedule in which the learning rate rises."""

VALIDATION_SEED = 500_000


LAKE_WEIGHT = 0.7
"""FrozenLake's weight in the loss of a step."""


@dataclass(frozen=True, slots=True)
class Share:
    """How much of one world a batch holds."""

    transcripts: Transcripts
    num_episodes: int
    num_steps: int


def lake_share(tokenizer: PreTrainedTokenizerFast) -> Share:
    """In every optimizer step, with most of the compute: this world needs planning on maps never seen."""
    return Share(Transcripts(worlds.frozen_lake(), tokenizer), 20, 20)


def other_shares(tokenizer: PreTrainedTokenizerFast) -> list[Share]:
    """The worlds that can be learned by heart; the optimizer steps take them in turn."""
    return [
        Share(Transcripts(worlds.taxi(), tokenizer), 5, 20),
        Share(Transcripts(worlds.blackjack(), tokenizer), 32, 2),
        Share(Transcripts(worlds.cliff_walking(), tokenizer), 4, 20),
    ]


def transcript_loss(model: LlamaForCausalLM, batch: Batch, pad: int) -> torch.Tensor:
    """Pretraining: mean cross-entropy over every token that is not padding."""
    tokens = torch.from_numpy(batch.tokens)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad)


def expert_loss(model: LlamaForCausalLM, batch: Batch, actions: torch.Tensor, end: int) -> torch.Tensor:
    """Fine-tuning: mean cross-entropy of the policy's actions under the expert's distribution, and of the turn's end.

    Only live action positions count, and the position after each, where the turn ends.
    """
    action_at = torch.from_numpy(batch.action_at)
    tokens = torch.from_numpy(batch.tokens[:, : batch.action_at[-1] + 1])
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    act = model.lm_head(hidden[:, action_at - 1]).float().log_softmax(dim=-1)[..., actions]
    stop = model.lm_head(hidden[:, action_at]).float().log_softmax(dim=-1)[..., end]
    losses = -(torch.from_numpy(batch.labels) * act).sum(dim=-1) - stop
    alive = torch.from_numpy(batch.alive)
    return (losses * alive).sum() / alive.sum()


class Optimizer:
    """Muon (Jordan, 2024) for the matrices inside the layers, AdamW for embeddings and norms, one schedule for both."""

    def __init__(self, model: LlamaForCausalLM, peak: float) -> None:
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self._model = model
        self._peak = peak
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=peak, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, progress: float) -> None:
        """One update at `progress` (0 to 1) of the schedule: a linear warm-up, then a cosine to 2% of the peak."""
        cosine = 0.02 + 0.98 * (1 + np.cos(np.pi * progress)) / 2
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self._peak * min(1.0, progress / WARMUP + 0.01) * cosine
            part.step()
        self._model.zero_grad(set_to_none=True)


class Trainer:
    """A run's model, tokenizer, data and optimizer, advanced one optimizer step at a time."""

    def __init__(self, seed: int, peak: float) -> None:
        torch.manual_seed(seed)
        self._rng = np.random.default_rng(seed)
        self.tokenizer = train_tokenizer(
            [worlds.frozen_lake(), worlds.cliff_walking(), worlds.taxi(), worlds.blackjack()]
        )
        self.model = new_model(self.tokenizer)
        self.num_tokens = 0
        self._lake = lake_share(self.tokenizer)
        self._others = cycle(other_shares(self.tokenizer))
        self._optimizer = Optimizer(self.model, peak)

    def step(self, progress: float, pretraining: bool) -> dict[str, float]:
        """One update over a batch of FrozenLake and one of another world; returns the loss of each."""
        losses: dict[str, float] = {}
        for share, weight in ((self._lake, LAKE_WEIGHT), (next(self._others), 1 - LAKE_WEIGHT)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = self._loss(share, pretraining)
            (weight * loss).backward()
            losses[share.transcripts.world.name] = loss.item()
        self._optimizer.step(progress)
        return losses

    def _loss(self, share: Share, pretraining: bool) -> torch.Tensor:
        behaviour: Behaviour = "random" if pretraining else ("expert" if self._rng.random() < 0.1 else "explore")
        instructed = bool(self._rng.random() < INSTRUCTED)
        batch = share.transcripts.sample(self._rng, share.num_episodes, share.num_steps, behaviour, instructed)
        self.num_tokens += batch.tokens.size
        if pretraining:
            return transcript_loss(self.model, batch, self.tokenizer.pad_token_id)
        actions = torch.from_numpy(share.transcripts.actions)
        return expert_loss(self.model, batch, actions, self.tokenizer.eos_token_id)

    def validate(self, num_episodes: int) -> float:
        """The share of FrozenLake episodes on held-out maps that reach the goal; not the final evaluation's seeds."""
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + num_episodes)
        player = Player(self.model, self.tokenizer)
        # No shortest path is longer than 12 steps; an untrained policy would wander to the limit of 100.
        episodes = player.play("episodic/FrozenLakeRandom-v0", seeds, maps="held_out", max_episode_steps=14)
        return sum(episode.success for episode in episodes) / num_episodes


def ticks(steps: int, minutes: float | None) -> Iterator[float]:
    """The progress (0 to 1) at each optimizer step: over `steps`, or over the clock when `minutes` is given."""
    if minutes is None:
        yield from (step / steps for step in range(steps))
        return
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield progress


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("training/out"),
    seed: int = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 800,
    minutes: Annotated[float | None, typer.Option(help="Fit the schedule to the clock instead of to --steps.")] = None,
    pretrain: Annotated[float, typer.Option(min=0, max=1, help="Share of the schedule on random play.")] = 0.08,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    check_every: Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints.")] = 100,
    threads: int = 2,
) -> None:
    """Pretrains on random play, fine-tunes on expert play, and checks FrozenLake on held-out maps on the way."""
    torch.set_num_threads(threads)
    trainer = Trainer(seed, peak)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=1000)
        losses: dict[str, float] = {}
        for step, progress in enumerate(ticks(steps, minutes), start=1):
            losses |= trainer.step(progress, pretraining=progress < pretrain)
            shown = " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            bar.update(task, completed=int(1000 * progress), description=f"step {step} {shown}")
            if step % check_every == 0:
                reached = trainer.validate(64)
                bar.console.print(f"step {step}, {trainer.num_tokens:,} tokens, {shown}, goal reached {reached:.0%}")
                export(trainer.model, trainer.tokenizer, out / "checkpoint")
        bar.update(task, completed=1000)
        bar.console.print(
            f"goal reached on held-out maps: {trainer.validate(500):.1%} after {trainer.num_tokens:,} tokens"
        )
    export(trainer.model, trainer.tokenizer, out / "policy")


if __name__ == "__main__":
    typer.run(train)
