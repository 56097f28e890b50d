"""The servers that several end-to-end tests share. A test that kills one must start it again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import POLICY
from tests.e2e.server import Server

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("e2e")).start()
    yield started
    if started.process is not None and started.process.poll() is None:
        started.kill()


@pytest.fixture(scope="package")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the packaged policy with think tags of its own, and an engine that computes in float32."""
    folder = tmp_path_factory.mktemp("thinker")
    model = folder / "model"
    _make_thinker(model)
    started = Server(folder, model=str(model), engine__reasoning_parser="qwen3", engine__dtype="float32").start()
    yield started
    started.kill()


def _make_thinker(folder: Path) -> None:
    """Saves the packaged policy with Qwen's tags as tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.add_tokens(TAGS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(POLICY)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
