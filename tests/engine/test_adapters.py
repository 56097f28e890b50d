"""The check of LoRA adapters: invalid ones are refused, and valid ones are copied to a folder named by their digest."""

import json
import os
from pathlib import Path

import pytest

from service.engine.adapters import AdapterRefused, adopt, base_shapes
from tests.conftest import POLICY
from tests.support.adapters import make_adapter


def adopt_from(folder: Path, tmp_path: Path):
    return adopt(folder, tmp_path / "kept", base=base_shapes(POLICY), max_rank=8)


def test_valid_adapter_is_copied_under_its_digest(tmp_path: Path):
    first = adopt_from(make_adapter(tmp_path / "a", 1), tmp_path)
    again = adopt_from(make_adapter(tmp_path / "b", 1), tmp_path)
    other = adopt_from(make_adapter(tmp_path / "c", 2), tmp_path)
    assert first == again
    assert first.folder.name == first.digest != other.digest
    assert sorted(path.name for path in first.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert len(list((tmp_path / "kept").iterdir())) == 2, "a temporary folder remains"
    make_adapter(tmp_path / "a", 3)
    assert adopt_from(tmp_path / "b", tmp_path) == first, "the copy changed with its source"


def test_two_replicas_can_adopt_an_adapter_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_adapter(tmp_path / "a", 1)
    replace, others = os.replace, []

    def replaced(*paths: Path) -> None:
        if not others:  # the other replica does everything in this moment
            others.append(None)
            others[0] = adopt_from(folder, tmp_path)
        replace(*paths)

    monkeypatch.setattr("os.replace", replaced)
    assert adopt_from(folder, tmp_path) == others[0]
    assert len(list((tmp_path / "kept").iterdir())) == 1, "a temporary folder remains"


def test_an_adapter_of_the_output_layer_fits_a_model_with_tied_embeddings(tmp_path: Path):
    assert adopt_from(make_adapter(tmp_path / "a", 1, modules=("q_proj", "lm_head")), tmp_path).rank == 4
    with pytest.raises(AdapterRefused, match="lm_head has shape"):
        adopt_from(make_adapter(tmp_path / "b", 1, modules=("lm_head",), num_in=48), tmp_path)


def test_an_adapter_of_the_embeddings_is_refused_by_name(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    folder = make_adapter(tmp_path / "a", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = tensors.pop(first)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="LoRA on embeddings"):
        adopt_from(folder, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "has no adapter_model.safetensors",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text(" " * (2 << 20)), "too large"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "cannot be read"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:-9]
            ),
            "cannot be read",
        ),
        (lambda f: make_adapter(f, 1, rank=16), "rank is 16; at most 8"),
        (lambda f: make_adapter(f, 1, r=6), "rank 4"),
        (lambda f: make_adapter(f, 1, r=-1), "r: "),
        (lambda f: make_adapter(f, 1, r=True), "r: "),
        (lambda f: make_adapter(f, 1, rank_pattern={"q_proj": 99}), "rank is 99"),
        (lambda f: make_adapter(f, 1, peft_type="LOHA"), "peft_type"),
        (lambda f: make_adapter(f, 1, use_dora=True), "DoRA"),
        (lambda f: make_adapter(f, 1, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda f: make_adapter(f, 1, num_in=48), "in the base model"),
        (lambda f: make_adapter(f, 1, modules=("c_attn",)), "made for another model"),
        (lambda f: make_adapter(f, 1, modules=()), "empty"),
    ],
)
def test_invalid_adapter_is_refused_without_a_copy(tmp_path: Path, spoil, message: str):
    folder = make_adapter(tmp_path / "a", 1)
    spoil(folder)
    with pytest.raises(AdapterRefused, match=message):
        adopt_from(folder, tmp_path)
    assert list((tmp_path / "kept").iterdir()) == []


def test_unpaired_lora_matrix_is_refused(tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    folder = make_adapter(tmp_path / "a", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="one half"):
        adopt_from(folder, tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    folder = make_adapter(tmp_path / "a", 1)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(secret)
    with pytest.raises(AdapterRefused, match=r"has no adapter_config\.json"):
        adopt_from(folder, tmp_path)
