"""Converts a GGUF file to the folder of a Hugging Face model, in bfloat16. Runs as a program: FILE FOLDER."""

import importlib
import sys
from pathlib import Path
from typing import Any


def convert(file: Path, folder: Path) -> None:
    """Writes the configuration, the tokenizer and the dequantized weights. Raises ValueError if weights are missing.

    transformers itself can load a GGUF file, but keeps its weights packed, and cannot save them.
    """
    torch: Any = importlib.import_module("torch")  # imported dynamically, because their types are incomplete
    transformers: Any = importlib.import_module("transformers")
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config = transformers.AutoConfig.from_pretrained(**source)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    read = reader.load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    weights = {name: torch.as_tensor(tensor).to(torch.bfloat16) for name, tensor in read.items()}
    model.to_empty(device="cpu")
    loaded = model.load_state_dict(weights, strict=False)
    if lost := [*loaded.unexpected_keys, *(set(loaded.missing_keys) - set(model.all_tied_weights_keys))]:
        raise ValueError(f"these weights of {file.name} do not fit the model: {', '.join(sorted(lost))}")
    model.tie_weights()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors are written for the owner only, and the service may run as another user


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
