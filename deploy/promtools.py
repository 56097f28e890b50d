"""Finds Prometheus's programs: on PATH, or in Debian's `prometheus` package, which is unpacked and not installed.

Both the tests and deploy/check.py use it, in different environments, so it imports the standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "prometheus"


class Missing(Exception):
    """The program is not installed and cannot be downloaded. The message says why."""


def program(name: str) -> Path:
    """Returns the path of `prometheus` or `promtool`. Raises Missing."""
    if found := shutil.which(name):
        return Path(found)
    if not (CACHE / "usr" / "bin" / name).exists():
        _unpack()
    return CACHE / "usr" / "bin" / name


def _unpack() -> None:
    """Unpacks the package into CACHE in one atomic step, because another process may do the same at the same time."""
    CACHE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
        folder = Path(scratch)
        _run("apt-get", "--quiet", "download", "prometheus", folder=folder)
        _run("dpkg-deb", "--extract", *map(str, folder.glob("*.deb")), "files", folder=folder)
        if not CACHE.exists():
            os.replace(folder / "files", CACHE)


def _run(*command: str, folder: Path) -> None:
    try:
        ran = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)  # noqa: S603
    except OSError as error:
        raise Missing(f"Prometheus is not on PATH. To download it, install {command[0]}") from error
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines()[-1:]
        raise Missing(
            f"Prometheus is not on PATH, and downloading Debian's package with {command[0]} failed: {''.join(last)}"
        )
