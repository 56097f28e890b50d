"""An embedding model that generates no text: /v1 serves it, and episodes are rejected."""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import Server


def make_encoder(folder: Path) -> None:
    """Saves a BERT with 64 dimensions, a vocabulary of letters, and random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]
    pieces = models.WordPiece({piece: place for place, piece in enumerate(vocabulary)}, unk_token="[UNK]")  # noqa: S106
    tokenizer: Any = Tokenizer(pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, special.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=1.0,  # large, so that the embeddings of different texts differ
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder / "letters")
    started = Server(folder, model=str(folder / "letters")).start()
    yield started
    started.kill()


def test_embeddings_and_pooling(encoder: Server) -> None:
    with openai.OpenAI(base_url=f"{encoder.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        (model,) = [found.id for found in client.models.list()]
        one, other, again = client.embeddings.create(model=model, input=["a b", "zebra", "a b"]).data
        assert len(one.embedding) == 64
        assert one.embedding == pytest.approx(again.embedding, abs=1e-5)
        assert one.embedding != pytest.approx(other.embedding, abs=1e-2)
    with httpx.Client(base_url=encoder.url, timeout=60) as http:
        pooled = http.post("/pooling", json={"model": model, "input": "a b"}).json()["data"][0]["data"]
        assert len(pooled) == 64
        body = {"model": model, "query": "a b", "documents": ["zebra", "a b"]}
        assert http.post("/v1/rerank", json=body).json()["results"][0]["index"] == 1


def test_it_has_no_episodes_and_no_chat(encoder: Server) -> None:
    with httpx.Client(base_url=encoder.url, timeout=60) as http:
        refused = http.post("/episode", json={})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        assert http.post("/v1/chat/completions", json={}).status_code == 404
