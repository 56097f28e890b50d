"""The base model, its LoRA adapter (by PEFT), and the folder that training writes.

The folder has the two files that `PUT /policy/{name}` loads, and a card, `episodic_adapter.json`.
"""

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from service.files import complete_file
from service.learning import NEEDS_PEFT, TrainingRefused
from service.learning.options import ALPHA, RANK, Device, Options

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "episodic_adapter.json"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peft() -> Any:
    """The module peft. Raises TrainingRefused if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise TrainingRefused(NEEDS_PEFT) from error


def choose_device(wanted: Device) -> torch.device:
    """Raises TrainingRefused if there is no such device."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingRefused("--device cuda: PyTorch finds no GPU. Use --device cpu, or check the driver.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_base(model: str, options: Options, device: torch.device) -> Any:
    """Loads a language model of the transformers library: causal, or an encoder-decoder. Raises TrainingRefused."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        is_encoder_decoder = transformers.AutoConfig.from_pretrained(model).is_encoder_decoder
        kind = transformers.AutoModelForSeq2SeqLM if is_encoder_decoder else transformers.AutoModelForCausalLM
        base = kind.from_pretrained(model, dtype=_DTYPES[options.dtype])
    except SafetensorError as error:
        raise TrainingRefused(
            f"the base model {model} cannot be loaded: its weights are damaged or incomplete ({error})"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingRefused(f"the base model {model} cannot be loaded: {error}") from error
    return base.to(device)


def sized(options: Options, initial: Path | None) -> Options:
    """Returns the options with the adapter's rank and alpha. `initial` is the folder of an adapter that has its own.

    Raises TrainingRefused if the options give others than the initial adapter has.
    """
    rank, alpha = (RANK, ALPHA) if initial is None else _size(initial)
    wanted = replace(options, rank=options.rank or rank, alpha=options.alpha or alpha)
    if initial is not None and (wanted.rank, wanted.alpha) != (rank, alpha):
        raise TrainingRefused(
            f"the adapter {initial} has rank {rank} and alpha {alpha}, and keeps them. Leave out --rank and --alpha, "
            "or train a new adapter without --init-adapter."
        )
    return wanted


def _size(folder: Path) -> tuple[int, int]:
    try:
        config: Any = json.loads(read_files(folder)[CONFIG])
        return config["r"], config["lora_alpha"]
    except (ValueError, LookupError, TypeError) as error:
        raise TrainingRefused(f"{folder / CONFIG} is not the configuration of a LoRA adapter: {error!r}") from error


def new_adapter(base: Any, options: Options, name: str) -> Any:
    """Adds a LoRA adapter to all linear layers but the output layer. At first it changes nothing.

    name: of the base model, for the adapter's configuration.
    """
    library = peft()
    config = library.LoraConfig(
        r=options.rank or RANK,
        lora_alpha=options.alpha or ALPHA,
        target_modules="all-linear",
        bias="none",
        lora_dropout=0.0,
        task_type="SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
    )
    model = library.get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = name
    return model


def load_adapter(base: Any, folder: Path, name: str) -> Any:
    """Adds the adapter of a folder, which can then be trained further. Raises TrainingRefused."""
    try:
        model = peft().PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except SafetensorError as error:
        raise TrainingRefused(f"the weights of the adapter {folder} are damaged or incomplete: {error}") from error
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise TrainingRefused(f"the adapter {folder} does not fit the base model: {error}") from error
    model.peft_config["default"].base_model_name_or_path = name
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Returns the adapter's weights under PEFT's names, on the CPU in float32."""
    state: Mapping[str, torch.Tensor] = peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in sorted(state.items())}


def set_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    peft().set_peft_model_state_dict(model, dict(weights))


def files_of(model: Any) -> dict[str, bytes]:
    """Returns the adapter's files, by name."""
    return {CONFIG: _configuration(model), WEIGHTS: _serialized(weights_of(model))}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files to a folder, which appears only when it is complete. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)
        for name, content in files.items():
            with complete_file(scratch / name) as file:
                file.write(content)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _serialized(weights: Mapping[str, torch.Tensor]) -> bytes:
    library: Any = importlib.import_module("safetensors.torch")
    return library.save(dict(weights), metadata={"format": "pt"})


def _configuration(model: Any) -> bytes:
    """PEFT's configuration. Sets become sorted lists, so that the same adapter always has the same bytes."""
    fields: dict[str, Any] = model.peft_config["default"].to_dict()
    return json.dumps({**fields, "inference_mode": True}, indent=2, sort_keys=True, default=sorted).encode() + b"\n"


def read_files(folder: Path) -> dict[str, bytes]:
    """Reads the files of an adapter. Raises TrainingRefused if one is missing."""
    try:
        return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    except OSError as error:
        raise TrainingRefused(f"the folder {folder} is not an adapter: {error.filename}: {error.strerror}") from error


def digest(files: Mapping[str, bytes]) -> str:
    """The digest of an adapter's files (`engine.adapters.AdapterFiles`)."""
    return hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in (CONFIG, WEIGHTS))).hexdigest()


def version_of(files: Mapping[str, bytes], base_version: str) -> str:
    """The `policy_version` that the service gives to an adapter (`agent.policies`)."""
    return hashlib.sha256(f"{base_version}:{digest(files)}".encode()).hexdigest()[:12]
