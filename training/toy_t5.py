"""Trains the packaged encoder-decoder policy from scratch: `python -m training.toy_t5`.

Each step of an episode is an example of its own: the encoder reads the transcript as the service renders it, and the
decoder writes the action. The target is the expert's distribution over actions (as in DAgger: see training.data).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from service.engine.encoder_prompt import DEFAULT_TEMPLATE, rendered
from training import worlds
from training.curves import CSV, PLOT, Curves, plot
from training.data import Behaviour, play
from training.tokenizer import byte_level_bpe, texts
from training.toy_text import INSTRUCTED, LAKE_WEIGHT, Optimizer, ticks
from training.worlds import Floats, Ints, World

PAD, END = "<pad>", "</s>"
VOCAB_SIZE = 4096
MAX_LEN = 128
"""The longest window of a transcript. It has room for step 0 and 20 further steps."""

# The text is split into these pieces before BPE, and each piece that occurs in the worlds becomes one token: a sentence
# of the instructions, a row of a map, a position, the start of a line. Short inputs make training cheap, because each
# step of an episode is encoded again.
PIECES = (
    r"\n*(?:Observation|Action):| ?[A-Z][^.\n]*\.|[ \n]?\p{N}: [SFHG](?: [SFHG])*|[ \n]?row \p{N}+, column \p{N}+"
    r"|, (?:passenger|destination) \p{L}+|,? ?\p{L}+|,? ?\p{N}{1,3}|\n| ?[^\s\p{L}\p{N}]+|\s+"
)

SOURCE_TEXT = "Observation: {observation}"
"""The template of the profile `source-text`."""

EXPERT_BATCHES = 0.1
"""The fraction of batches that the expert plays alone."""


@dataclass(frozen=True, slots=True)
class Share:
    """One world's part of an optimizer step: the number of examples, and the length of the episodes they are from."""

    world: World
    num_examples: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Examples:
    """What the encoder reads, and the expert's distribution over the world's actions, of shape (examples, actions)."""

    texts: Sequence[str]
    labels: Floats


def sample(share: Share, rng: np.random.Generator, behaviour: Behaviour, instructed: bool) -> Examples:
    """Plays episodes, and draws steps of them.

    Half of the examples have a window that has slid: step 0 and the latest steps. Some examples of worlds without a map
    use the template of the profile `source-text`: the observation alone.
    """
    world = share.world
    num_episodes = max(share.num_examples // 4, 1)
    which = rng.choice(len(world.weights), size=num_episodes, p=world.weights / world.weights.sum())
    walk = play(world, rng, which, share.num_steps, behaviour)
    alive = np.argwhere(walk.alive)
    chosen = alive[rng.choice(len(alive), size=share.num_examples)]
    system = world.instructions if instructed else ""
    num_bare = 0 if world.first[0] else share.num_examples // 4
    inputs: list[str] = []
    for place, (row, step) in enumerate(chosen):
        template = SOURCE_TEXT if place < num_bare else DEFAULT_TEMPLATE
        start = int(rng.integers(1, step + 1)) if step > 1 and place % 2 else 1
        first, shown = world.first[which[row]], [0, *range(start, step + 1)] if step else [0]
        states, actions = walk.states[row, shown], walk.actions[row, shown]
        inputs.append(_text(world, first, states, actions, template, system))
    rows, steps = chosen.T
    return Examples(inputs, world.expert[which[rows], walk.states[rows, steps]])


def _text(world: World, first: str, states: Ints, actions: Ints, template: str, system: str) -> str:
    """Returns what the encoder reads at the last of these states, as the service renders it."""
    seen = [world.states[state] for state in states]
    seen[0] = first + seen[0]
    turns = list(zip(seen, (world.actions[action] for action in actions), strict=False))
    return rendered(template, system, turns, seen[-1])


def train_tokenizer(all_worlds: list[World]) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the texts of the worlds. It puts the end token after each text."""
    # An action is a reply of its own, and part of the history, where a space precedes it.
    corpus = (
        f"{text}\n\nObservation: {text}\nAction: {text}\nObservation: {text}\nAction:" for text in texts(all_worlds)
    )
    core = byte_level_bpe(corpus, PIECES, (PAD, END), VOCAB_SIZE)
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, core.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LEN,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """A new model with random weights. The encoder does the planning, so it has most of the layers."""
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        d_model=256,
        d_kv=64,
        d_ff=512,
        num_layers=4,
        num_decoder_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        n_positions=MAX_LEN,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def export(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the policy to `folder` in the format of transformers, with the weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    served = T5ForConditionalGeneration(model.config)
    served.load_state_dict(model.state_dict())
    served = served.to(torch.bfloat16)
    served.generation_config = GenerationConfig(
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    served.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


class Trainer:
    """The model, tokenizer, data and optimizer of a training run."""

    def __init__(self, seed: int, peak: float) -> None:
        torch.manual_seed(seed)
        self._rng = np.random.default_rng(seed)
        lake, cliff, taxi, blackjack = (
            worlds.frozen_lake(),
            worlds.cliff_walking(),
            worlds.taxi(),
            worlds.blackjack(),
        )
        self.tokenizer = train_tokenizer([lake, cliff, taxi, blackjack])
        self.model = new_model(self.tokenizer)
        self.num_tokens = 0
        self._lake = Share(lake, 256, 14)
        self._others = [Share(taxi, 96, 16), Share(blackjack, 96, 3), Share(cliff, 64, 16)]
        self._rotation = cycle(self._others)
        self._optimizer = Optimizer(self.model, peak)

    @property
    def worlds(self) -> list[str]:
        """The names of all worlds."""
        return [share.world.name for share in (self._lake, *self._others)]

    def step(self, progress: float) -> dict[str, float]:
        """One optimizer step over examples of FrozenLake and of another world. Returns the losses by world."""
        losses: dict[str, float] = {}
        for share, weight in ((self._lake, LAKE_WEIGHT), (next(self._rotation), 1 - LAKE_WEIGHT)):
            behaviour: Behaviour = "expert" if self._rng.random() < EXPERT_BATCHES else "explore"
            examples = sample(share, self._rng, behaviour, bool(self._rng.random() < INSTRUCTED))
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.loss(share.world, examples)
            (weight * loss).backward()
            losses[share.world.name] = loss.item()
        self._optimizer.step(progress)
        return losses

    def loss(self, world: World, examples: Examples) -> torch.Tensor:
        """The sum of two cross-entropies: of the action, whose target is the expert's distribution, and of the end."""
        batch = self.tokenizer(list(examples.texts), padding=True, return_tensors="pt")
        self.num_tokens += batch["input_ids"].numel()
        actions = torch.tensor(self.tokenizer(list(world.actions), add_special_tokens=False)["input_ids"])[:, 0]
        labels = torch.from_numpy(examples.labels)
        start = torch.full((len(labels),), self.model.config.decoder_start_token_id)
        replies = torch.stack([start, actions[labels.argmax(-1)]], dim=1)
        logits = self.model(**batch, decoder_input_ids=replies, use_cache=False).logits.float().log_softmax(-1)
        return -((labels * logits[:, 0, actions]).sum(-1) + logits[:, 1, self.tokenizer.eos_token_id]).mean()


def train(
    out: Annotated[Path, typer.Option(help="Folder for the policy and the curves.")] = Path("training/out-t5"),
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps.")] = 3000,
    minutes: Annotated[float | None, typer.Option(help="Train for so many minutes, instead of for --steps.")] = None,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    check_every: Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints.")] = 200,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 2,
) -> None:
    """Train the packaged encoder-decoder policy on the expert's actions."""
    torch.set_num_threads(threads)
    trainer = Trainer(seed, peak)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns) as bar, Curves(out / CSV, trainer.worlds) as curves:
        task = bar.add_task("training", total=1000)
        latest: dict[str, float] = {}
        for step, progress in enumerate(ticks(steps, minutes), start=1):
            losses = trainer.step(progress)
            latest |= losses
            loss_text = " ".join(f"{name} {loss:.3f}" for name, loss in latest.items())
            bar.update(task, completed=int(1000 * progress), description=f"step {step} {loss_text}")
            if step % check_every == 0:
                bar.console.print(f"step {step}, {trainer.num_tokens:,} tokens, loss {loss_text}")
                export(trainer.model, trainer.tokenizer, out / "checkpoint")
            curves.add(step, "fine-tuning", trainer.num_tokens, losses, None)
        bar.update(task, completed=1000)
    export(trainer.model, trainer.tokenizer, out / "policy")
    plot(out / CSV, out / PLOT)


if __name__ == "__main__":
    typer.run(train)
