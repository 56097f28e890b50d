"""Checks LoRA adapters before the engine loads them, because some invalid adapters crash the engine."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

from pydantic import BaseModel, Field, ValidationError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""The bits of the exponent of a number, by the type's name in safetensors."""
_CHUNK = 1 << 22
_ABANDONED_S = 24 * 3600.0

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a model's weights, by name. A linear layer has the shape (outputs, inputs)."""


class Limits(TypedDict):
    """What an adapter must fit.

    base: shapes of the base model's weights. None skips this check.
    max_rank: the largest rank that the engine accepts.
    """

    base: Shapes | None
    max_rank: int


class AdapterRefused(Exception):
    """The adapter cannot be loaded. Callers receive the message, so it names no files but the adapter's."""


class _Config(BaseModel):
    """The fields of PEFT's LoraConfig that are checked."""

    peft_type: Literal["LORA"]
    r: int = Field(gt=0, strict=True)
    rank_pattern: dict[str, Annotated[int, Field(gt=0, strict=True)]] = {}
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The checked copy of an adapter.

    folder: named by the digest; its files never change.
    digest: SHA-256 of the adapter's files, in hex.
    rank: the largest rank of its layers.
    """

    folder: Path
    digest: str
    rank: int


def adopt(source: Path, kept: Path, **limits: Unpack[Limits]) -> AdapterFiles:
    """Copies the adapter in the folder `source` to a subfolder of `kept`, and checks the copy.

    Raises AdapterRefused if the adapter is invalid, and OSError if its files cannot be copied.
    """
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix=".adopting-") as scratch:
        copy = Path(scratch)
        for name in (CONFIG, WEIGHTS):
            file = (source / name).resolve()
            if not file.is_file() or not file.is_relative_to(source.resolve()):
                raise AdapterRefused(f"the adapter folder has no {name} (links out of the folder are not followed)")
            shutil.copyfile(file, copy / name)
        rank, digest = _check(copy, **limits), _digest(copy)
        folder, complete = kept / digest, copy / "complete"
        complete.mkdir()
        for name in (CONFIG, WEIGHTS):
            os.replace(copy / name, complete / name)
        try:
            os.replace(complete, folder)
        except OSError:
            if not folder.is_dir():
                raise
            # The same files are there already: from an earlier load, or from another replica at this moment.
    return AdapterFiles(folder, digest, rank)


def check_kept(kept: Path, digest: str, **limits: Unpack[Limits]) -> None:
    """Checks the copy that `adopt` made earlier, perhaps for another base model. Raises AdapterRefused."""
    folder = kept / digest
    try:
        if _digest(folder) != digest:
            raise AdapterRefused("the adapter's files have changed since it was loaded")
        _check(folder, **limits)
    except OSError as error:
        raise AdapterRefused(
            f"the adapter's files cannot be read ({error.strerror}); replicas need a shared folder for them"
        ) from error


def remove_files(kept: Path, digests: Collection[str]) -> None:
    """Deletes the copies of these adapters, and what interrupted loads and uploads have left in the folder."""
    old = time.time() - _ABANDONED_S
    for path in kept.glob("*"):
        is_rest = path.name.startswith((".adopting-", ".upload-")) and path.stat().st_mtime < old
        if path.name in digests or is_rest:
            shutil.rmtree(path, ignore_errors=True)


def base_shapes(folder: Path) -> Shapes | None:
    """Reads the shapes of a model's weights from its safetensors files in `folder`. Returns None if there are none.

    If the embeddings are tied, the output layer has no weights of its own. Its shape is that of the embeddings.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes.update(_read_shapes(path))
    tied = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
    if tied is not None:
        shapes.setdefault("lm_head.weight", tied)
    return shapes or None


def _check(folder: Path, base: Shapes | None, max_rank: int) -> int:
    config = _config(folder / CONFIG)
    if config.use_dora or config.modules_to_save or config.bias != "none":
        raise AdapterRefused(f"{CONFIG}: only plain LoRA is supported: no DoRA, no bias, no modules_to_save")
    ranks = {config.r, *config.rank_pattern.values()}
    if max(ranks) > max_rank:
        raise AdapterRefused(
            f"the adapter's rank is {max(ranks)}; at most {max_rank} is allowed (engine option max_lora_rank)"
        )
    shapes = _shapes(folder / WEIGHTS)
    for module, halves in _modules(shapes).items():
        if set(halves) != {"lora_A", "lora_B"}:
            raise AdapterRefused(f"{module} has only one half of a LoRA pair; lora_A and lora_B are required")
        (rank_a, num_in), (num_out, rank_b) = halves["lora_A"], halves["lora_B"]
        if rank_a != rank_b or rank_a not in ranks:
            raise AdapterRefused(f"{module}: lora_A has rank {rank_a}, which differs from lora_B or {CONFIG}")
        if base is None:
            continue
        weight = base.get(f"{module}.weight")
        if weight is None:
            raise AdapterRefused(f"the base model has no layer {module}: the adapter was made for another model")
        if weight != (num_out, num_in):
            raise AdapterRefused(
                f"{module} has shape {weight} in the base model, but {(num_out, num_in)} in the adapter"
            )
    _check_finite(folder / WEIGHTS)
    return max(ranks)


def _config(path: Path) -> _Config:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterRefused(f"{CONFIG} is too large; at most {_MAX_CONFIG_BYTES} bytes are allowed")
    try:
        return _Config.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterRefused(f"{CONFIG}: {where}: {first['msg']}") from error


def _shapes(path: Path) -> Shapes:
    from safetensors import SafetensorError

    try:
        return _read_shapes(path)
    except (SafetensorError, OSError) as error:
        raise AdapterRefused(f"{WEIGHTS} cannot be read: {str(error)[:200]}") from error


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    opened: Any = safe_open(path, framework="np")
    with opened as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _check_finite(path: Path) -> None:
    """Refuses weights that are NaN or infinite, with which no act could succeed. All bits of their exponent are 1."""
    import numpy as np

    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    weights = np.memmap(path, np.uint8, "r", offset=8 + header_size)
    for name, tensor in header.items():
        if tensor["dtype"] not in _EXPONENTS:
            continue
        kind, exponent = _EXPONENTS[tensor["dtype"]]
        begin, end = tensor["data_offsets"]
        words = weights[begin:end].view(kind)
        for start in range(0, len(words), _CHUNK):
            if ((words[start : start + _CHUNK] & exponent) == exponent).any():
                raise AdapterRefused(f"{WEIGHTS}: {name[:200]} contains NaN or infinity")


def _modules(shapes: Shapes) -> dict[str, dict[str, tuple[int, int]]]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if half.startswith("lora_embedding"):
            raise AdapterRefused(
                f"{WEIGHTS}: LoRA on embeddings ({module}) is not supported; train without it in target_modules"
            )
        if not name.startswith(_PREFIX) or half not in ("lora_A", "lora_B") or len(shape) != 2:
            raise AdapterRefused(f"{WEIGHTS}: the tensor {name[:200]!r} is not part of a LoRA pair")
        found.setdefault(module.removeprefix(_PREFIX), {})[half] = (shape[0], shape[1])
    if not found:
        raise AdapterRefused(f"{WEIGHTS} is empty: it contains no LoRA weights")
    return found


def _digest(folder: Path) -> str:
    """Returns the digest of the adapter in this folder."""
    return hashlib.sha256(b"".join(_digest_of(folder / name) for name in (CONFIG, WEIGHTS))).hexdigest()


def _digest_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
