"""`make lock`: resolves pyproject.toml to exact versions with hashes, for every Python that the project supports.

Runs uv from .venv. The locks name no package index.
"""

from __future__ import annotations

import sys
from pathlib import Path

from run_uv import TORCH_CPU_INDEX, uv

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PYTHON = Path(sys.executable)
# The CPU engine requires these and runs without them. The default index has CUDA builds only, and torchvision's breaks
# the import of transformers under a CPU torch. torch itself is in torch-cpu.lock.
NOT_FROM_THE_DEFAULT_INDEX = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
PROJECT = str(ROOT / "pyproject.toml")


def main() -> None:
    omitted = [word for name in NOT_FROM_THE_DEFAULT_INDEX for word in ("--no-emit-package", name)]
    cpu = [PROJECT, "--extra", "cpu", "--extra", "train", "--group", "dev", *omitted]
    locked = compile_lock("cpu", cpu) or compile_lock("cpu", [*cpu, "--index", TORCH_CPU_INDEX])
    # A folder of wheels may hold a CPU build of torch.
    locked &= compile_lock("gpu", [PROJECT, "--extra", "gpu", "--extra", "train", "--group", "dev"], find_links=False)
    locked &= compile_lock("deploy", ["--group", "deploy"])
    locked &= compile_lock("bootstrap", [str(REQUIREMENTS / "bootstrap.in")])
    sys.exit(not locked)


def compile_lock(name: str, options: list[str], *, find_links: bool = True) -> bool:
    """Writes requirements/<name>.lock, or leaves it unchanged and returns False."""
    lock = REQUIREMENTS / f"{name}.lock"
    command = ["pip", "compile", "--output-file", str(lock), "--upgrade", "--generate-hashes", "--universal"]
    command += ["--python-version", "3.11", "--fork-strategy", "fewest", "--index-strategy", "unsafe-best-match"]
    command += ["--no-header", "--no-annotate", "--quiet", *options]
    if uv(PYTHON, *command, find_links=find_links) != 0:
        return False
    num_packages = sum("==" in line for line in lock.read_text(encoding="utf-8").splitlines())
    sys.stdout.write(f"{lock.relative_to(ROOT)}: {num_packages} packages\n")
    return True


if __name__ == "__main__":
    main()
