"""The files of a model's weights, and their version: a digest that is computed once for each file."""

import hashlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

_PATTERNS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
_SETTLED_S = 2.0
"""A file that changed less than this many seconds ago may change again within the resolution of its time stamp."""

Known = dict[str, list[Any]]
"""The size, the time stamps and the digest of each file, by path."""


def weights_version(model: Path, cache: Path | None = None) -> str | None:
    """Returns a digest of the names and the whole contents of a model's weight files; None if there are none.

    model: a folder, or a single file.
    cache: a file with the digests of earlier calls. A file of the same path, size and time stamps is not read again.
    """
    files = _files(model)
    if not files:
        return None
    known = _read(cache)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        found = list(pool.map(partial(_entry, known), files))
    if cache is not None:
        _write(cache, known | {path: entry for path, entry in found if time.time() - entry[1] / 1e9 > _SETTLED_S})
    parts = [f"{file.name}:{entry[-1]}" for file, (_, entry) in zip(files, found, strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def model_folder(model: str) -> Path:
    """Returns the folder of the weights: `model` itself, or the local cache of the Hugging Face hub."""
    if Path(model).is_dir():
        return Path(model)
    hub: Any = importlib.import_module("huggingface_hub")  # imported dynamically, because its types are incomplete
    return Path(hub.snapshot_download(model, local_files_only=True, allow_patterns=["*.safetensors"]))


def _files(model: Path) -> Sequence[Path]:
    """Returns the files of the first format that the folder has: vLLM reads only one."""
    if model.is_file():
        return [model]
    for pattern in _PATTERNS:
        if files := sorted(model.glob(pattern)):
            return files
    return []


def _entry(known: Known, file: Path) -> tuple[str, list[Any]]:
    path, status = str(file.resolve()), file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if path in known and known[path][:-1] == stamp:
        return path, known[path]
    with file.open("rb") as content:
        return path, [*stamp, hashlib.file_digest(content, "sha256").hexdigest()]


def _read(cache: Path | None) -> Known:
    try:
        known: Any = json.loads(cache.read_bytes()) if cache else {}
    except (OSError, ValueError):  # there is none yet, or it is damaged: then every file is read
        return {}
    return cast("Known", known) if isinstance(known, dict) else {}


def _write(cache: Path, known: Known) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            json.dump(known, file)
        os.replace(file.name, cache)
    except OSError:  # the folder may be read-only: then the next start reads the files again
        return
