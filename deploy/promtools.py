"""Owns where Prometheus's programs come from: PATH, or else Debian's `prometheus` package, unpacked and not installed.

For the tests and for checks of deploy/ that run in another environment, so it uses the standard library alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "prometheus"


class Missing(Exception):
    """The program is not here and cannot be had; the message says why."""


def program(name: str) -> Path:
    """Where `prometheus` or `promtool` is. Raises Missing."""
    if found := shutil.which(name):
        return Path(found)
    if not (CACHE / "usr" / "bin" / name).exists():
        _unpack()
    return CACHE / "usr" / "bin" / name


def _unpack() -> None:
    """Puts the package's files under CACHE, all of them or none: others may be at it at the same moment."""
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
        raise Missing(f"Prometheus is not on PATH, and there is no {command[0]}") from error
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines()[-1:]
        raise Missing(f"Prometheus is not on PATH, and {command[0]} cannot fetch Debian's package: {''.join(last)}")
