"""Owns the set-up behind `make install`: .venv, built from the lock of one device, left alone when it is up to date.
.venv-deploy is made likewise, for the tools of `make check-deploy`: their dependencies would not fit into .venv.

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
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
TOOLS = ROOT / ".venv-deploy"
DEVICES = ("cpu", "gpu")
OLDEST_PYTHON = (3, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(what: str) -> None:
    if what not in (*DEVICES, "deploy"):
        sys.exit(f"DEVICE is {' or '.join(DEVICES)}, not {what!r}.")
    started = time.monotonic()
    lock = ROOT / "requirements" / f"{what}.lock"
    venv = TOOLS if what == "deploy" else VENV
    # The two builds of the engine share one import name, and scripts hold the folder's path: neither survives a change.
    stages: dict[str, Callable[[], None]] = {
        f"{what} {ROOT}": lambda: create_venv(venv),
        checksum(lock): lambda: install_lock(venv, lock, what),
    }
    if venv == VENV:
        itself = ("--quiet", "--no-build-isolation", "--editable", str(ROOT))
        stages[checksum(ROOT / "pyproject.toml")] = lambda: pip(*itself)
    if set_up(venv, stages):
        for_what = "checks of deploy/" if what == "deploy" else what.upper()
        say(f"Set up for the {for_what} in {time.monotonic() - started:.0f} s.")


def set_up(venv: Path, stages: dict[str, Callable[[], None]]) -> bool:
    """Runs the stages, by their marks, from the first one that is not done. Returns whether there was any to run."""
    stamp = venv / ".installed"  # a line a finished stage
    wanted = list(stages)
    done = stamp.read_text(encoding="utf-8").splitlines() if stamp.exists() and python_of(venv).exists() else []
    if done == wanted:
        return False
    first = next((i for i, mark in enumerate(wanted) if done[i : i + 1] != [mark]), 0)
    for i in range(first, len(wanted)):
        if i:
            stamp.write_text("\n".join(wanted[:i]), encoding="utf-8")
        stages[wanted[i]]()
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return True


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def checksum(path: Path) -> str:
    """The sha256 of the file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def create_venv(venv: Path) -> None:
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
    say(f"Creating {venv} with Python {sys.version.split()[0]}")
    python = Path(sys.executable).resolve()  # an activated .venv names its own link, which is about to go
    shutil.rmtree(venv, ignore_errors=True)
    run(str(python), "-m", "venv", str(venv))


def install_lock(venv: Path, lock: Path, device: str) -> None:
    """Installs what the lock names and nothing else."""
    requirements = lock.read_text(encoding="utf-8").splitlines()
    say(f"Installing {len(requirements)} locked packages")
    if device == "cpu":
        install_cpu_torch(next(line for line in requirements if line.startswith("torch==")))
    pip("--requirement", str(lock), python=python_of(venv))


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
