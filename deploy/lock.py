"""Owns the locks behind `make lock`: pyproject.toml resolved to exact versions for every Python the project supports.

Runs uv in a scratch environment. uv does not read pip's configuration, so the places where pip looks for packages are
handed over from `pip config`; none of them is written to a lock.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The CPU engine asks for these and runs without them: the default index has CUDA builds alone, and torchvision's breaks
# the import of transformers under a CPU torch.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec", "triton")


def main() -> None:
    pip = pip_settings()
    omitted = repeat("--no-emit-package", CUDA_ONLY)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)  # noqa: S603
        subprocess.run([f"{scratch}/bin/python", "-m", "pip", "install", "--quiet", "uv"], check=True)  # noqa: S603
        uv = f"{scratch}/bin/uv"
        environment = {**os.environ, **uv_environment(pip)}
        # As in install.py: PyTorch's index is asked only for what pip's own places do not have.
        cpu, gpu = (["pyproject.toml", "--extra", device, "--group", "dev"] for device in ("cpu", "gpu"))
        find_links = repeat("--find-links", pip.get("find-links", []))
        locked = compile_lock(uv, environment, "cpu", [*cpu, *omitted, *find_links])
        locked = locked or compile_lock(uv, environment, "cpu", [*cpu, *omitted, "--index", TORCH_CPU_INDEX])
        locked = compile_lock(uv, environment, "gpu", gpu) and locked
        locked = compile_lock(uv, environment, "deploy", ["--group", "deploy"]) and locked
    sys.exit(not locked)


def pip_settings() -> dict[str, list[str]]:
    """What pip is configured with, {option: words}: a word set in the environment stands before one from a file."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    settings: dict[str, list[str]] = {}
    for line in listing.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        words = value.strip("'\"").replace("\\n", " ").split()
        settings[option] = list(dict.fromkeys(settings.get(option, []) + words))
    return settings


def uv_environment(pip: dict[str, list[str]]) -> dict[str, str]:
    """uv's names for pip's indexes and certificates."""
    environment: dict[str, str] = {}
    if "index-url" in pip:
        environment["UV_DEFAULT_INDEX"] = pip["index-url"][0]
    if "extra-index-url" in pip:
        environment["UV_INDEX"] = " ".join(pip["extra-index-url"])
    if "cert" in pip:
        environment["SSL_CERT_FILE"] = pip["cert"][0]
    return environment


def compile_lock(uv: str, environment: dict[str, str], name: str, options: list[str]) -> bool:
    """Writes requirements/<name>.lock anew, or leaves it as it is and returns False."""
    lock = ROOT / "requirements" / f"{name}.lock"
    command = [uv, "pip", "compile", "--output-file", str(lock)]
    command += ["--upgrade", "--universal", "--python-version", "3.11", "--fork-strategy", "fewest"]
    command += ["--index-strategy", "unsafe-best-match", "--no-header", "--no-annotate", "--quiet", *options]
    if subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode != 0:  # noqa: S603
        return False
    print(f"{lock.relative_to(ROOT)}: {len(lock.read_text(encoding='utf-8').splitlines())} lines")
    return True


def repeat(option: str, values: tuple[str, ...] | list[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


if __name__ == "__main__":
    main()
