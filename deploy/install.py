"""`make install`: sets up .venv from the lock of one device, or .venv-deploy for the tools of `make check-deploy`.

Runs on the bare interpreter and uses the standard library only. pip brings uv into the environment, and uv installs the
lock there. Every file is checked against its hash in the lock. Nothing happens if the environment is up to date.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from run_uv import TORCH_CPU_INDEX, uv

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
BOOTSTRAP = REQUIREMENTS / "bootstrap.lock"
TORCH_CPU = REQUIREMENTS / "torch-cpu.lock"
LOCKS = {
    "cpu": [REQUIREMENTS / "cpu.lock", TORCH_CPU],
    "gpu": [REQUIREMENTS / "gpu.lock"],
    "deploy": [REQUIREMENTS / "deploy.lock"],
}
OLDEST_PYTHON = (3, 11)


def main(what: str) -> None:
    if what not in LOCKS:
        sys.exit(f"DEVICE is cpu or gpu, not {what!r}.")
    with only_one():
        set_up(what)


@contextmanager
def only_one() -> Iterator[None]:
    """Waits while another process sets up an environment in this folder."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another command that sets up this folder")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def set_up(what: str) -> None:
    started = time.monotonic()
    venv = ROOT / (".venv-deploy" if what == "deploy" else ".venv")
    stamp = venv / ".installed"
    # The two builds of the engine share one import name, and scripts contain the folder's path: neither can be changed.
    place = f"{what} {ROOT}"
    wanted = f"{place}\n{checksum([*LOCKS[what], BOOTSTRAP, ROOT / 'pyproject.toml'])}\n"
    installed = stamp.read_text(encoding="utf-8") if stamp.exists() and python_of(venv).exists() else ""
    if installed == wanted:
        return
    if not installed.startswith(f"{place}\n"):
        create(venv)
    stamp.unlink(missing_ok=True)
    install(venv, what)
    stamp.write_text(wanted, encoding="utf-8")
    say(f"Set up {venv.name} in {time.monotonic() - started:.0f} s.")


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def checksum(files: list[Path]) -> str:
    """The sha256 of the files' bytes, in hex."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def create(venv: Path) -> None:
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"Episodic needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}.\n"
            "Name a newer one, for example: make install PYTHON=python3.12"
        )
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            f"{sys.executable} cannot create a virtual environment: its ensurepip module is missing.\n"
            "On Debian and Ubuntu, install it: apt install python3-venv"
        )
    say(f"Creating {venv.name} with Python {sys.version.split()[0]}")
    python = Path(sys.executable).resolve()  # an activated .venv names its own link, which is removed here
    shutil.rmtree(venv, ignore_errors=True)
    run(str(python), "-m", "venv", str(venv))


def install(venv: Path, what: str) -> None:
    """Installs what the locks name, and removes everything else."""
    python = python_of(venv)
    run(
        str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "--requirement", str(BOOTSTRAP)
    )
    if what == "cpu":
        install_torch_cpu(python)
    say(f"Installing the packages of {LOCKS[what][0].relative_to(ROOT)}")
    locks = [str(lock) for lock in (*LOCKS[what], BOOTSTRAP)]
    # Bytecode is compiled now, by all cores, so that the first start is as fast as every other.
    check(uv(python, "pip", "sync", "--python", str(python), *HASHED, "--compile-bytecode", *locks))
    if what != "deploy":
        itself = ("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        check(uv(python, "pip", "install", "--quiet", "--python", str(python), *itself))


# A missing wheel is an error at once, instead of a failed build later: no compiler is needed.
HASHED = ("--quiet", "--require-hashes", "--no-build")


def install_torch_cpu(python: Path) -> None:
    """Installs torch's CPU build from where pip is configured to look, or from PyTorch's index of CPU wheels."""
    command = ("pip", "install", "--python", str(python), *HASHED, "--no-deps", "--requirement", str(TORCH_CPU))
    say("Installing torch")
    if uv(python, *command, quiet=True) != 0:
        say(f"The configured package indexes have no CPU build of torch: trying {TORCH_CPU_INDEX}")
        check(uv(python, *command, "--default-index", TORCH_CPU_INDEX))


def run(*command: str) -> None:
    check(subprocess.run(command, check=False).returncode)  # noqa: S603


def check(status: int) -> None:
    if status != 0:
        sys.exit(status)


def say(line: str) -> None:
    print(f"==> {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
