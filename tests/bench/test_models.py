"""The random Qwen3 that the benchmark makes: vLLM's decisions accept its tokenizer, and moves stay single tokens."""

from pathlib import Path
from typing import Any

import pytest

from bench import models
from bench.workloads import DECISION
from service.engine.fetch import FetchFailed
from tests.conftest import POLICY


def test_the_random_model_is_a_qwen3_with_a_token_for_each_label(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = models.weights("qwen3", POLICY, tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).architectures == ["Qwen3ForCausalLM"]
    words = ("A", "Z", "0", "9", "yes", "no", *DECISION.actions)
    assert [len(tokenizer.encode(word, add_special_tokens=False)) for word in words] == [1] * len(words)
    assert tokenizer.get_vocab()["no"] not in tokenizer.encode("north")


def test_a_model_that_cannot_be_fetched_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Path:
        raise FetchFailed("no network")

    monkeypatch.setattr(models, "fetch", refuse)
    with pytest.raises(models.Missing, match="no network"):
        models.weights("smollm2", POLICY, tmp_path)
