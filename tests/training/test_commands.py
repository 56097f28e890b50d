"""The commands of `training/`: a short training with its curves, and an evaluation of the packaged policy."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from service.engine.encoder_prompt import EncoderPrompt
from service.engine.seq2seq.loading import describe
from service.engine.tokenizer import HFTokenizer
from training import curves, evaluate, toy_t5, toy_text, worlds


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(command: Any, *arguments: str | Path) -> str:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_short_training_writes_the_policy_and_its_curves(tmp_path: Path):
    steps = ("--steps", "2", "--pretrain", "0.5", "--check-every", "2", "--threads", "1")
    printed = run(toy_text.train, "--out", tmp_path, *steps, "--check-episodes", "2", "--final-episodes", "2")
    assert "goal reached on held-out maps: " in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.hidden_size == 256
    pretrained, tuned = csv.DictReader((tmp_path / "curves.csv").read_text().splitlines())
    assert (pretrained["step"], pretrained["stage"]) == ("1", "pretraining")
    assert (tuned["step"], tuned["stage"]) == ("2", "fine-tuning")
    assert 0 < int(pretrained["tokens"]) < int(tuned["tokens"])
    assert 0 < float(pretrained["seconds"]) < float(tuned["seconds"])
    for row, trained, others in [
        (pretrained, ("frozen_lake", "taxi"), ("blackjack", "cliff_walking")),
        (tuned, ("frozen_lake", "blackjack"), ("taxi", "cliff_walking")),
    ]:
        assert all(float(row[world]) > 1 for world in trained)  # of an untrained model
        assert not any(row[world] for world in others)
    assert not pretrained["goal_reached"]
    assert float(tuned["goal_reached"]) in {0, 0.5, 1}
    drawn = (tmp_path / "curves.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    assert f"Wrote {again}." in run(curves.draw, tmp_path / "curves.csv", "--out", again).replace("\n", "")
    assert again.read_bytes() == drawn


def test_a_short_training_writes_an_encoder_decoder_policy(tmp_path: Path):
    run(toy_t5.train, "--out", tmp_path, "--steps", "3", "--check-every", "2", "--threads", "1")
    described = describe(str(tmp_path / "policy"), "t5", {}, None)
    assert described.info.max_model_len == toy_t5.MAX_LEN
    rows = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["frozen_lake"]) > 1 for row in rows)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_examples_are_rendered_and_encoded_as_in_the_service():
    world = worlds.frozen_lake()
    tokenizer = toy_t5.train_tokenizer([world, worlds.cliff_walking(), worlds.taxi(), worlds.blackjack()])
    rng = np.random.default_rng(1)
    examples = toy_t5.sample(toy_t5.Share(world, 40, 10), rng, "explore", True)
    own = HFTokenizer(tokenizer)
    assert tokenizer(list(examples.texts))["input_ids"] == [own.encode_input(text) for text in examples.texts]
    assert all(text.startswith(world.instructions) and text.endswith("\nAction:") for text in examples.texts)
    assert examples.labels.sum(axis=1) == pytest.approx(1)
    assert EncoderPrompt(own, (0,), (1,)).encode_reply("left") == [tokenizer.encode("left")[0]]


def test_the_evaluation_prints_a_row_for_each_environment():
    printed = run(evaluate.report, "--episodes", "2")
    rows = {cells[0]: cells[1:] for line in printed.splitlines() if (cells := line.replace("│", " ").split())}
    assert set(evaluate.ENVIRONMENTS) <= set(rows)
    assert rows["CliffWalking-v1"] == ["2", "100.0%", "-13.000", "13.00"]
