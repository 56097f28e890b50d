"""`python -m bench.seq2seq`: acts per second of an encoder-decoder model, compared with the loop of texts on agents.

That loop calls `model.generate` for one observation after the other. For discrete actions, the comparison scores each
action by one call of the model. Both sides use the same T5 with random weights, the same observations and greedy
replies. They alternate; the table has the medians.
"""

import asyncio
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from service.client import AsyncClient
from tests.e2e.server import Server

POLICY = Path(__file__).parents[1] / "service" / "packaged" / "policies" / "toy-t5"
REPLY_TOKENS = 12
ACTIONS = (
    "move the red piece one step left now",
    "move the red piece one step right now",
    "move the blue piece one step left now",
    "move the green piece one step up now",
)
WORDS = [
    "the",
    "lamp",
    "door",
    "key",
    "is",
    "on",
    "off",
    "open",
    "red",
    "blue",
    "green",
    "near",
    "far",
    "left",
    "right",
    "of",
    "a",
    "table",
    "box",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """A comparison. `bar`: the ratio that is aimed at."""

    name: str
    num_episodes: int
    discrete: bool
    bar: float


CELLS = (
    Cell("text, 32 episodes", 32, False, 5.0),
    Cell("text, 1 episode", 1, False, 1.0),
    Cell("4 actions, 32 episodes", 32, True, 3.0),
    Cell("4 actions, 1 episode", 1, True, 1.0),
)


def make_model(folder: Path, layers: int, width: int) -> int:
    """Writes a T5 with random weights. Returns its number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=8192,
        d_model=width,
        d_kv=64,
        d_ff=width * 8 // 3,
        num_layers=layers,
        num_heads=width // 64,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def observations(num: int, num_words: int) -> list[str]:
    generator = random.Random(num)  # noqa: S311 - not a secret
    return [" ".join(generator.choices(WORDS, k=num_words)) for _ in range(num)]


class Loop:
    """The plain loop: one observation after the other."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def write(self, observation: str) -> str:
        inputs = self._tokenizer(f"Observation: {observation}", return_tensors="pt")
        ids = self._model.generate(**inputs, max_new_tokens=REPLY_TOKENS, do_sample=False)[0]
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @torch.inference_mode()
    def choose(self, observation: str) -> str:
        inputs = self._tokenizer(f"Observation: {observation}", return_tensors="pt")
        scores: list[float] = []
        for action in ACTIONS:
            labels = self._tokenizer(action, return_tensors="pt")["input_ids"]
            logprobs = self._model(**inputs, labels=labels).logits[0].log_softmax(-1)
            scores.append(float(logprobs.gather(1, labels[0][:, None]).sum()))
        return ACTIONS[scores.index(max(scores))]


def looped(act: Callable[[str], str], texts: Sequence[str]) -> float:
    """Returns the acts per second."""
    began = time.perf_counter()
    for text in texts:
        act(text)
    return len(texts) / (time.perf_counter() - began)


async def served(url: str, cell: Cell, texts: Sequence[str]) -> float:
    """Plays episodes at the same time, and returns the acts per second."""
    space: Any = {"type": "discrete", "actions": list(ACTIONS)} if cell.discrete else {"type": "text"}
    sampling = {"temperature": 0, "max_tokens": REPLY_TOKENS}
    async with AsyncClient(url) as client:
        episodes = [
            await client.episode(profile="source-text", action_space=space, sampling=sampling)
            for _ in range(cell.num_episodes)
        ]

        async def play(place: int) -> None:
            for text in texts[place :: cell.num_episodes]:
                await episodes[place].act(text)

        began = time.perf_counter()
        await asyncio.gather(*map(play, range(cell.num_episodes)))
        return len(texts) / (time.perf_counter() - began)


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the encoder, and of the decoder.")] = 6,
    width: Annotated[int, typer.Option(min=64, help="Features of a token (d_model).")] = 384,
    words: Annotated[int, typer.Option(min=1, help="Words of an observation.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each cell. The table has the medians.")] = 3,
) -> None:
    """Compare the service with the plain loop."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "t5")
        size = make_model(model, layers, width)
        loop, server = Loop(model), Server(Path(folder, "run"), model=str(model)).start()
        try:
            table = Table("cell", "service, acts/s", "loop, acts/s", "ratio", "bar")
            for cell in CELLS:
                texts = observations(128 if cell.num_episodes > 1 else 24, words)
                act = loop.choose if cell.discrete else loop.write
                pairs = [(asyncio.run(served(server.url, cell, texts)), looped(act, texts[:24])) for _ in range(rounds)]
                ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
                table.add_row(cell.name, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}", f"{cell.bar:g}")
        finally:
            server.stop()
    console.print(f"T5 with {size / 1e6:.1f} million parameters, float32, {torch.get_num_threads()} threads")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
