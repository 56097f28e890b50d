"""Owns the set-up behind `make install`: .venv, built from the lock of one device, left alone when it is up to date.

Runs on the bare interpreter, before anything is installed, so it uses the standard library alone. Torch comes first and
by itself: its CPU build is not on the default index, and an extra index slows pip down for every package asked of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".installed"  # a line a finished stage; a set-up goes on after the last stage that still holds
DEVICES = ("cpu", "gpu")
OLDEST_PYTHON = (3, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(device: str) -> None:
    if device not in DEVICES:
        sys.exit(f"DEVICE is {' or '.join(DEVICES)}, not {device!r}.")
    lock = ROOT / "requirements" / f"{device}.lock"
    # The two builds of the engine share one import name, and scripts hold the folder's path: neither survives a change.
    wanted = [f"{device} {ROOT}", checksum(lock), checksum(ROOT / "pyproject.toml")]
    installed = STAMP.read_text(encoding="utf-8").splitlines() if STAMP.exists() and VENV_PYTHON.exists() else []
    if installed == wanted:
        return
    started = time.monotonic()
    if installed[:1] != wanted[:1]:
        create_venv()
    if installed[:2] != wanted[:2]:
        STAMP.write_text("\n".join(wanted[:1]), encoding="utf-8")
        install_lock(lock, device)
    STAMP.write_text("\n".join(wanted[:2]), encoding="utf-8")
    pip("--quiet", "--no-build-isolation", "--editable", str(ROOT))
    STAMP.write_text("\n".join(wanted), encoding="utf-8")
    say(f"Set up for the {device.upper()} in {time.monotonic() - started:.0f} s.")


def checksum(path: Path) -> str:
    """The sha256 of the file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def create_venv() -> None:
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"Episodic needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}.\n"
            "Name a newer one, for example: make install PYTHON=python3.12"
        )
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            f"{sys.executable} cannot make a virtual environment: its ensurepip module is missing.\n"
            "On Debian and Ubuntu it is a package of its own: apt install python3-venv"
        )
    say(f"Creating {VENV} with Python {sys.version.split()[0]}")
    python = Path(sys.executable).resolve()  # an activated .venv names its own link, which is about to go
    shutil.rmtree(VENV, ignore_errors=True)
    run(str(python), "-m", "venv", str(VENV))


def install_lock(lock: Path, device: str) -> None:
    """Installs what the lock names and nothing else."""
    requirements = lock.read_text(encoding="utf-8").splitlines()
    say(f"Installing {len(requirements)} locked packages")
    if device == "cpu":
        install_cpu_torch(next(line for line in requirements if line.startswith("torch==")))
    pip("--requirement", str(lock))


def install_cpu_torch(requirement: str, python: Path = VENV_PYTHON) -> None:
    """From the indexes and find-links pip is configured with, or else from PyTorch's index of CPU wheels."""
    command = pip_command(requirement, python=python)
    if subprocess.run(command, stderr=subprocess.PIPE, check=False).returncode != 0:  # noqa: S603
        say(f"{requirement} is not where pip is configured to look: trying {TORCH_CPU_INDEX}")
        pip("--extra-index-url", TORCH_CPU_INDEX, requirement, python=python)


def pip(*arguments: str, python: Path = VENV_PYTHON) -> None:
    run(*pip_command(*arguments, python=python))


def pip_command(*arguments: str, python: Path) -> list[str]:
    # Wheels alone: no compiler is needed, and a missing wheel is an error at once instead of a failed build later.
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    return [str(python), "-m", "pip", "install", *options, *arguments]


def run(*command: str) -> None:
    finished = subprocess.run(command, check=False)  # noqa: S603
    if finished.returncode != 0:
        sys.exit(finished.returncode)


def say(line: str) -> None:
    print(f"==> {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
