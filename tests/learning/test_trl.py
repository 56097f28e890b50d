"""Runs the example of docs/training.md for TRL's SFTTrainer on an export of a service."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from episodic import Client
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import serve

ROOT = Path(__file__).parents[2]
PACKAGED = "service/packaged/policies/toy-text"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
LOAD, TRAIN = BLOCKS[-2:]
SPACE = {"type": "discrete", "actions": ["left", "down", "right", "up"]}


def train() -> Any:
    """Runs the two blocks, in float32 and with a log of each step. Returns the trainer."""
    changed = TRAIN.replace(PACKAGED, str(ROOT / PACKAGED))
    changed = changed.replace("max_length=None", "max_length=None, logging_steps=1, bf16=False, use_cpu=True")
    names: dict[str, Any] = {}
    exec(LOAD + changed, names)  # noqa: S102 - it is ours
    return names["trainer"]


def sampled(url: str) -> list[tuple[list[int], list[int]]]:
    """The token ids of each segment, and the places of the sampled ones."""
    with Client(url) as client:
        segments = [segment for document in client.export("tokens") for segment in document["segments"]]
    return [(each["token_ids"], [at for at, mask in enumerate(each["loss_mask"]) if mask]) for each in segments]


def labelled(batch: dict[str, torch.Tensor]) -> dict[tuple[int, ...], list[int]]:
    """The places that have a label in a batch, by the token ids of each row."""
    found: dict[tuple[int, ...], list[int]] = {}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        found[tuple(ids[mask == 1].tolist())] = torch.nonzero(labels != -100)[:, 0].tolist()
    return found


@torch.no_grad()
def mean_loss(segments: list[tuple[list[int], list[int]]]) -> float:
    """The mean cross-entropy of the sampled tokens, by plain code."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / PACKAGED, dtype=torch.float32)
    losses: list[float] = []
    for ids, places in segments:
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[place - 1, ids[place]]) for place in places]
    return sum(losses) / len(losses)


@pytest.mark.filterwarnings("default")
async def test_only_sampled_tokens_contribute_to_the_loss_of_sft(
    tokenizer: HFTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    async with serve(tmp_path / "data", ScriptedEngine(tokenizer)) as api:
        for number in range(6):
            await api.open(f"e{number}", tags=["first-try"], action_space=SPACE, instructions="Walk to the goal.")
            for step in range(1 + number):
                await api.act(f"e{number}", observation=f"row {step}, column {number}")
            await api.client.post(f"/episode/e{number}/end", json={"terminated": True, "success": True})
        monkeypatch.setenv("EPISODIC_URL", api.url)
        segments = await asyncio.to_thread(sampled, api.url)
        trainer = await asyncio.to_thread(train)
    (batch,) = trainer.get_train_dataloader()
    assert labelled(batch) == {tuple(ids): places for ids, places in segments}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean_loss(segments), rel=1e-4)
    assert trainer.state.global_step == 3
