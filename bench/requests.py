"""`python -m bench.requests`: requests to the model for a discrete action of several tokens, with real scores.

A model of transformers scores the branches, one request after the other. The plans are those of the service.
"""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from service.agent.action_spaces import DiscreteSpace, Probs
from service.engine.base import Transcript, Wanted
from service.engine.completion import Scores
from service.engine.tokenizer import HFTokenizer
from service.settings import Settings
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Sampling

_WAYS: tuple[tuple[str, Probs, float], ...] = (
    ("all, temperature 1", "all", 1.0),
    ("taken, temperature 1", "taken", 1.0),
    ("taken, temperature 0", "taken", 0.0),
)
_console = Console(width=100, highlight=False)


class ModelScores(ScriptedEngine):
    """An engine whose scores are those of a model of transformers."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(HFTokenizer(AutoTokenizer.from_pretrained(folder)))
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    async def score(self, prompt_token_ids: list[int], candidates: Sequence[int], **_: Any) -> Scores:
        await self._call(prompt_token_ids, None)
        with self._torch.inference_mode():
            logits = self._model(input_ids=self._torch.tensor([prompt_token_ids]), logits_to_keep=1).logits[0, -1]
        return Scores(tuple(logits.log_softmax(-1)[list(candidates)].tolist()), 0)


def main(
    acts: Annotated[int, typer.Option(min=1, help="Acts of each row.")] = 10,
    models: Annotated[list[str], typer.Option("--model", help="Model, as in EPISODIC_MODEL. May be repeated.")] = [  # noqa: B006
        "toy-text"
    ],
) -> None:
    """Count the requests of an act with 1,024 random actions of eight hexadecimal digits, and with 200 chess moves."""
    import asyncio

    table = Table("model", "actions", "probs", "requests of an act", title="Requests to the model")
    for model in models:
        given: dict[str, Any] = {"model": model}
        engine = ModelScores(str(Path(Settings(**given).model_path)))
        rows = [(name, actions, *way) for name, actions in _spaces().items() for way in _WAYS]
        for name, actions, label, probs, temperature in track(rows, description=model, transient=True):
            count = asyncio.run(_requests(engine, DiscreteSpace(actions, probs), temperature, acts))
            table.add_row(model, name, label, f"{count:.1f}")
    _console.print(table)


def _spaces() -> dict[str, tuple[str, ...]]:
    generator = random.Random(1)  # noqa: S311 - the same actions in each run
    squares = [f"{column}{row}" for column in "abcdefgh" for row in range(1, 9)]
    moves = {"".join(generator.sample(squares, 2)) for _ in range(400)}
    return {
        "1,024 of 8 hex digits": tuple(f"{number:08x}" for number in generator.sample(range(1 << 32), 1024)),
        "200 UCI moves": tuple(sorted(moves)[:200]),
    }


async def _requests(engine: ModelScores, space: DiscreteSpace, temperature: float, num_acts: int) -> float:
    """Returns the mean number of requests of an act."""
    counts: list[int] = []
    for number in range(num_acts if space.asked_probs == "taken" else 2):
        before = engine.num_calls
        wanted = Wanted(Sampling(temperature=temperature), lambda _, seed=number: random.Random(seed), nullcontext)  # noqa: S311
        transcript = Transcript("Choose.", engine.history(), f"situation {number}", 4096, slides=True)
        await engine.decide(transcript, space, wanted)
        counts.append(engine.num_calls - before)
    return fmean(counts)


if __name__ == "__main__":
    typer.run(main)
