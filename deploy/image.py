"""Owns the packages of an image: what the service needs to run and its environment lacks, at the versions of a lock.

A lock holds the developers' tools too, and the image for GPUs brings the engine along. So requirements are followed
from pyproject.toml through the metadata of what is installed, as pip does, until none is open. What the lock leaves
out, stays out. Runs on the interpreter that will serve; `tools` in place of a device installs what builds the wheel.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from install import TORCH_CPU, TORCH_CPU_INDEX

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    Found = tuple[str, Requirement, str | None]
    """A requirement, with its name as locks have it and the version that is installed."""

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(sys.executable)
PIP_INSTALL = [
    *(sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", "--only-binary", ":all:"),
    *("--disable-pip-version-check", "--requirement"),
]
ENGINE = "vllm"  # the image's own: neither installed nor looked into


def main(what: str) -> None:
    lock = read_lock(ROOT / "requirements" / ("gpu.lock" if what == "gpu" else "cpu.lock"))
    if what == "cpu":
        lock |= read_lock(TORCH_CPU)
    roots = read_roots(what)
    if importlib.util.find_spec("packaging") is None:  # which reads requirements, and is one itself
        install(["packaging"], lock)
    if others := unlike(roots):  # an image's own, of another version than the service is written for
        install(others, lock)
    while missing := lacking(roots, lock):
        install(missing, lock)
    if found := conflicts(roots):
        sys.exit("\n".join(found))


def read_lock(path: Path) -> dict[str, list[str]]:
    """The requirements of each name, with their hashes. If there are several, pip takes the one whose marker holds."""
    lock: dict[str, list[str]] = {}
    text = re.sub("^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for requirement in re.split(r"\n(?=\w)", text.strip()):
        lock.setdefault(requirement.partition("==")[0], []).append(requirement)
    return lock


def read_roots(what: str) -> list[str]:
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if what == "tools":
        return document["build-system"]["requires"]
    project = document["project"]
    return project["dependencies"] + project["optional-dependencies"][what]


def install(names: list[str], lock: dict[str, list[str]]) -> None:
    if ENGINE in names:
        sys.exit(f"{PYTHON} has no {ENGINE}: it comes with the image that this one is built on")
    if "torch" in names:
        install_torch_cpu()
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(requirement for name in names if name != "torch" for requirement in lock[name]))
        file.flush()
        subprocess.run([*PIP_INSTALL, file.name], check=True)  # noqa: S603
    importlib.invalidate_caches()


def install_torch_cpu() -> None:
    """Installs torch's CPU build from where pip is configured to look, or from PyTorch's index of CPU wheels."""
    command = [*PIP_INSTALL, str(TORCH_CPU)]
    if subprocess.run(command, stderr=subprocess.PIPE, check=False).returncode != 0:  # noqa: S603
        subprocess.run([*command, "--index-url", TORCH_CPU_INDEX], check=True)  # noqa: S603


def lacking(roots: list[str], lock: dict[str, list[str]]) -> list[str]:
    """The locked names that are required and not installed, as far as the metadata of what is installed tells."""
    return sorted({name for name, _, version in required(roots) if version is None and name in lock})


def unlike(roots: list[str]) -> list[str]:
    """Those of the roots that are installed in a version that they do not ask for; the engine is the image's."""
    return [name for name, _, _ in unsatisfied(required(roots, follow=False)) if name != ENGINE]


def conflicts(roots: list[str]) -> list[str]:
    """Versions that are installed and are not what somebody asks for."""
    return [
        f"{requirement} is required, and {version} is installed"
        for _, requirement, version in unsatisfied(required(roots))
    ]


def unsatisfied(requirements: Iterable[Found]) -> Iterator[Found]:
    """Those that are installed in another version."""
    for name, requirement, version in requirements:
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            yield name, requirement, version


def required(roots: list[str], *, follow: bool = True) -> Iterator[Found]:
    """The roots, and unless told otherwise what they require in turn."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = [Requirement(root) for root in roots]
    followed: set[tuple[str, str]] = set()
    while found:
        requirement = found.pop()
        name = canonicalize_name(requirement.name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            yield name, requirement, None
            continue
        yield name, requirement, installed.version
        for extra in {"", *requirement.extras} if follow and name != ENGINE else ():
            if (name, extra) not in followed:
                followed.add((name, extra))
                asked = map(Requirement, installed.requires or [])
                found += [one for one in asked if one.marker is None or one.marker.evaluate({"extra": extra})]


if __name__ == "__main__":
    main(sys.argv[1])
