"""The copy of the policy that is measured: same weights and conversations, but completions of any length."""

import json
from pathlib import Path

from bench.policy import endless
from service.engine.prompt import Prompt
from service.engine.tokenizer import HFTokenizer
from tests.conftest import POLICY


def test_the_copy_renders_the_same_prompts_and_no_word_ends_a_completion(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    copy = endless(POLICY, tmp_path / "policy")
    original, changed = AutoTokenizer.from_pretrained(POLICY), AutoTokenizer.from_pretrained(copy)
    ours, theirs = Prompt(HFTokenizer(original)), Prompt(HFTokenizer(changed))
    assert theirs.first_turn("Walk.", "S F") == ours.first_turn("Walk.", "S F")
    assert theirs.next_turn("row 1") == ours.next_turn("row 1")
    assert changed.eos_token_id == original.pad_token_id
    assert json.loads((copy / "config.json").read_text())["eos_token_id"] == original.pad_token_id
    assert (copy / "model.safetensors").resolve() == (POLICY / "model.safetensors").resolve()


def test_a_policy_without_such_tokens_is_measured_as_it_is(tmp_path: Path) -> None:
    assert endless(tmp_path, tmp_path / "policy") == tmp_path
