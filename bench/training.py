"""Compares the trainer with a plain PEFT loop on the same batches: tokens per second and peak memory.

Needs torch, transformers and peft, but not vLLM. Each measurement runs in a process of its own, and the two alternate.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from service.learning.adapter import new_adapter
from service.learning.batches import parts
from service.learning.options import Options
from service.learning.segments import Kind, Row
from service.learning.trainer import Trainer
from service.learning.units import Example, Unit

Contender = Literal["trainer", "plain"]
Size = Literal["policy", "1b"]

_POLICY = Path(__file__).parents[1] / "service" / "packaged" / "policies" / "toy-text" / "config.json"
_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_TOKENS_PER_STEP = 25
_NUM_ACTIONS = 4
_WARMUP = 2


def random_model(size: Size, device: str) -> Any:
    """A Llama with random weights: of the packaged policy's size in float32, or with a billion weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = json.loads(_POLICY.read_text()) if size == "policy" else _1B
    fields = {name: value for name, value in fields.items() if name not in ("dtype", "architectures", "model_type")}
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    return model.to(torch.float32 if size == "policy" else torch.bfloat16)


def random_units(num_units: int, vocab_size: int) -> list[Unit]:
    """Segments of the shape of FrozenLake episodes: a drawn action after every 25 tokens."""
    random = np.random.default_rng(0)
    return [(_example(int(random.integers(6, 24)), vocab_size, random),) for _ in range(num_units)]


def _example(num_steps: int, vocab_size: int, random: np.random.Generator) -> Example:
    token_ids = random.integers(0, vocab_size, 1 + _TOKENS_PER_STEP * num_steps, dtype=np.int32)
    positions = np.arange(_TOKENS_PER_STEP, len(token_ids), _TOKENS_PER_STEP, dtype=np.int32)
    token_ids[positions] = random.integers(0, _NUM_ACTIONS, num_steps)
    row = Row(
        token_ids=token_ids,
        positions=positions,
        kinds=np.full(num_steps, Kind.IDS, np.int32),
        logprobs=np.full(num_steps, -np.log(_NUM_ACTIONS), np.float32),
        steps=np.arange(num_steps, dtype=np.int32),
        support_ids=np.tile(np.arange(_NUM_ACTIONS, dtype=np.int32), num_steps),
        support_sizes=np.full(num_steps, _NUM_ACTIONS, np.int32),
        temperature=1.0,
        versions=(),
    )
    return Example(row, np.full(num_steps, random.normal(), np.float32))


def with_trainer(model: Any, units: Sequence[Unit], options: Options, device: str) -> Callable[[], int]:
    """Returns a function that takes an optimizer step of GRPO, and returns the number of tokens."""
    trainer = Trainer(model, units, options, torch.device(device))

    def step() -> int:
        return trainer.step().num_tokens

    return step


def with_plain_loop(model: Any, units: Sequence[Unit], options: Options, device: str) -> Callable[[], int]:
    """The same for the loop that one writes first: the model's own loss on labels, with a gradient for each part."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    steps = iter(range(1 << 30))
    num_batches = -(-len(units) // options.batch_size)

    def step() -> int:
        epoch, place = divmod(next(steps), num_batches)
        order = np.random.default_rng([options.seed, epoch]).permutation(len(units))
        batch = order[place * options.batch_size :][: options.batch_size].tolist()
        for part in parts(units, batch, options.max_batch_tokens):
            model(**_labelled([units[index][0].row for index in part], device)).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(len(units[index][0].row.token_ids) for index in batch)

    return step


def _labelled(rows: Sequence[Row], device: str) -> dict[str, torch.Tensor]:
    length = max(len(row.token_ids) for row in rows)
    input_ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for index, row in enumerate(rows):
        size = len(row.token_ids)
        input_ids[index, :size], mask[index, :size] = torch.from_numpy(row.token_ids), 1
        positions = torch.from_numpy(row.positions).long()
        labels[index, positions] = input_ids[index, positions]
    return {name: t.to(device) for name, t in (("input_ids", input_ids), ("attention_mask", mask), ("labels", labels))}


def measure(contender: Contender, size: Size, device: str, num_steps: int) -> dict[str, float]:
    """Returns tokens/s and the peak memory of some optimizer steps, after two that are not counted."""
    model = random_model(size, device)
    options = Options("grpo", batch_size=32)
    units = random_units(256, model.config.vocab_size)
    adapted = new_adapter(model, options, "random")
    step = {"trainer": with_trainer, "plain": with_plain_loop}[contender](adapted, units, options, device)
    before = _peak(device)
    num_tokens, began = 0, 0.0
    for number in range(_WARMUP + num_steps):
        if number == _WARMUP:
            _wait(device)
            num_tokens, began = 0, time.perf_counter()
        num_tokens += step()
    _wait(device)
    peak = _peak(device)
    return {"tokens_per_s": num_tokens / (time.perf_counter() - began), "peak": peak, "grown": peak - before}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str) -> float:
    """The peak of the memory of the GPU, or else of the process, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def compare(size: Size, device: str, num_rounds: int, num_steps: int) -> None:
    """Prints both contenders and their ratios."""
    found: dict[Contender, list[dict[str, float]]] = {"trainer": [], "plain": []}
    for _ in range(num_rounds):
        for contender, results in found.items():
            arguments = ["--contender", contender, "--size", size, "--device", device, "--steps", str(num_steps)]
            command = [sys.executable, "-m", "bench.training", *arguments]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    medians = {
        contender: {name: statistics.median(result[name] for result in results) for name in results[0]}
        for contender, results in found.items()
    }
    place = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    typer.echo(f"{size} on {place}, median of {num_rounds} rounds of {num_steps} steps")
    for contender, result in medians.items():
        typer.echo(
            f"  {contender:8} {result['tokens_per_s']:10,.0f} tokens/s   peak {result['peak']:8,.0f} MB, "
            f"of which {result['grown']:,.0f} MB for the steps"
        )
    ours, plain = medians["trainer"], medians["plain"]
    ratios = {name: ours[name] / max(plain[name], 1e-9) for name in ours}
    typer.echo(
        f"  trainer / plain: throughput {ratios['tokens_per_s']:.2f} (at least 0.9), peak memory {ratios['peak']:.2f} "
        f"(at most 1.3), memory for the steps {ratios['grown']:.2f}"
    )


def main(
    contender: Annotated[Contender | None, typer.Option(help="Measure one, and print it as JSON.")] = None,
    size: Annotated[Size | None, typer.Option(help="Size of the model. Default: policy, and 1b on a GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: both, if there is a GPU.")] = None,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1)] = 3,
    num_steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of a round.")] = 12,
) -> None:
    """Compare the trainer with a plain PEFT loop."""
    if contender:
        typer.echo(json.dumps(measure(contender, size or "policy", device or "cpu", num_steps)))
        return
    has_gpu = torch.cuda.is_available()
    for where in [device] if device else ["cpu", *(["cuda"] if has_gpu else [])]:
        for which in [size] if size else ["policy", *(["1b"] if where == "cuda" else [])]:
            compare(which, where, num_rounds, num_steps)


if __name__ == "__main__":
    typer.run(main)
