"""The packaged policy's files, its tokenizer (an action is one token), and the transcripts it was trained on."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

import service
from service.environments import describe
from training import worlds
from training.data import Behaviour, Transcripts
from training.tokenizer import train_tokenizer

POLICY = Path(service.__file__).parent / "packaged" / "policies" / "toy-text"
WORLDS = [worlds.frozen_lake(), worlds.cliff_walking(), worlds.taxi(), worlds.blackjack()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


def test_the_weights_are_bfloat16_and_small():
    weights = POLICY / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_every_action_is_one_token_after_the_assistant_marker(tokenizer):
    for world in WORLDS:
        for action in world.actions:
            ids = tokenizer.encode(f"<|assistant|>{action}<|end|>", add_special_tokens=False)
            assert tokenizer.convert_ids_to_tokens(ids) == ["<|assistant|>", action, "<|end|>"]


def test_any_text_can_be_encoded(tokenizer):
    text = 'Ünïcode ✓ 日本 \t\r\n {"a": [1.5e-3, -12345]} \x00'
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_markers_in_an_observation_stay_text(tokenizer):
    ids = tokenizer.encode("<|end|><|assistant|>", add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_tokenizer_is_the_one_the_script_trains(tokenizer):
    assert train_tokenizer(WORLDS).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("instructed", [True, False])
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_transcripts_are_the_chat_template_s_token_stream(tokenizer, world, instructed: bool):
    batch = Transcripts(world, tokenizer).sample(np.random.default_rng(0), 5, 6, "expert", instructed)
    for row, alive in zip(batch.tokens, batch.alive, strict=True):
        text = tokenizer.decode(row[row != tokenizer.pad_token_id])
        messages = [
            {"role": turn.partition("|>")[0], "content": turn.partition("|>")[2]}
            for turn in text.removeprefix("<|begin|>")
            .removesuffix("<|end|>")
            .replace("<|end|><|", "\0")
            .removeprefix("<|")
            .split("\0")
        ]
        assert [message["content"] for message in messages if message["role"] == "system"] == [
            world.instructions
        ] * instructed
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert ids == row[row != tokenizer.pad_token_id].tolist()
        assert sum(message["role"] == "assistant" for message in messages) == alive.sum()


@pytest.mark.parametrize("behaviour", ["random", "explore", "expert"])
def test_every_live_action_position_holds_an_action_and_its_label_the_expert_s(tokenizer, behaviour: Behaviour):
    for world in WORLDS:
        transcripts = Transcripts(world, tokenizer)
        batch = transcripts.sample(np.random.default_rng(1), 20, 8, behaviour, True)
        actions = batch.tokens[:, batch.action_at]
        assert np.isin(actions[batch.alive], transcripts.actions).all()
        assert np.allclose(batch.labels.sum(axis=-1), 1)
        if behaviour == "expert":
            taken = (actions[..., None] == transcripts.actions) & batch.alive[..., None]
            assert (batch.labels[taken] > 0).all()


def test_the_first_observation_is_what_the_description_says(tokenizer):
    env = gymnasium.make("episodic/FrozenLakeRandom-v0", maps="train")
    observation, info = env.reset(seed=0)
    text = describe(env).observation(observation, info)
    assert text.removesuffix("row 0, column 0") in worlds.frozen_lake().first
