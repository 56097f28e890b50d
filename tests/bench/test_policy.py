"""The copy of the policy that is measured: same prompts, but completions of any length."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bench.policy import endless
from service.engine.prompt import Prompt
from service.engine.tokenizer import HFTokenizer
from tests.conftest import POLICY


def test_the_copy_never_prefers_the_end_of_a_turn(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copy = endless(POLICY, tmp_path / "policy")
    prompt = Prompt(HFTokenizer(AutoTokenizer.from_pretrained(copy)))
    turn = prompt.first_turn("Walk.", "S F")
    assert turn == Prompt(HFTokenizer(AutoTokenizer.from_pretrained(POLICY))).first_turn("Walk.", "S F")
    model = AutoModelForCausalLM.from_pretrained(copy)
    written = model.generate(torch.tensor([turn]), do_sample=False, max_new_tokens=40, eos_token_id=prompt.terminator)
    assert written.shape[1] == len(turn) + 40


def test_the_other_weights_are_the_same(tmp_path: Path) -> None:
    copy = endless(POLICY, tmp_path / "policy")
    original, changed = load_file(POLICY / "model.safetensors"), load_file(copy / "model.safetensors")
    different = {name for name in original if not original[name].equal(changed[name])}
    assert original.keys() == changed.keys()
    assert different == {"model.embed_tokens.weight"}
    rows = (original["model.embed_tokens.weight"] != changed["model.embed_tokens.weight"]).any(dim=1)
    assert rows.sum() == 1


@pytest.mark.parametrize("configuration", [None, "{}"])
def test_a_policy_without_such_a_token_is_measured_as_it_is(tmp_path: Path, configuration: str | None) -> None:
    if configuration:
        (tmp_path / "config.json").write_text(configuration)
        (tmp_path / "model.safetensors").touch()
    assert endless(tmp_path, tmp_path / "policy") == tmp_path
