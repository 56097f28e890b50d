"""Shared by all tests: the path and the tokenizer of the packaged policy, and an environment without settings."""

import os
from pathlib import Path
from typing import Any

import pytest

import service
from service.engine.tokenizer import HFTokenizer

pytest_plugins = ["tests.support.databases"]

POLICY = Path(service.__file__).parent / "packaged" / "policies" / "toy-text"


@pytest.fixture(scope="session")
def hf_tokenizer() -> Any:
    """The packaged policy's Hugging Face tokenizer. A test that changes its chat template must load its own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="session")
def tokenizer(hf_tokenizer: Any) -> HFTokenizer:
    return HFTokenizer(hf_tokenizer)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the EPISODIC_* variables of the environment that the tests run in."""
    for name in [name for name in os.environ if name.startswith("EPISODIC_")]:
        monkeypatch.delenv(name)
