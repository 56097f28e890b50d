"""Installs the packages that an image needs to run the service, at the versions of a lock.

    python deploy/image.py cpu|gpu|tools

A lock also contains the developers' tools, and the GPU image already contains the engine with its packages. So this
script starts with the requirements in pyproject.toml and follows the metadata of the installed packages, as pip does,
until nothing is missing. It installs nothing that the lock does not name. Run it with the interpreter of the image.
`tools` installs the packages that build the wheel.
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
    """The normalized name of a package, a requirement on it, and its installed version if any."""

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(sys.executable)
PIP_INSTALL = [
    *(sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", "--only-binary", ":all:"),
    *("--disable-pip-version-check", "--requirement"),
]
ENGINE = "vllm"  # comes with the GPU image: never installed, and its dependencies are not checked


def main(what: str) -> None:
    lock = read_lock(ROOT / "requirements" / ("gpu.lock" if what == "gpu" else "cpu.lock"))
    if what == "cpu":
        lock |= read_lock(TORCH_CPU)
    roots = read_roots(what)
    if importlib.util.find_spec("packaging") is None:  # this script needs it to parse requirements
        install(["packaging"], lock)
    if others := unlike(roots):  # packages of the base image that the service needs in another version
        install(others, lock)
    while missing := lacking(roots, lock):
        install(missing, lock)
    if found := conflicts(roots):
        sys.exit("\n".join(found))


def read_lock(path: Path) -> dict[str, list[str]]:
    """Returns the requirements of each package, with hashes. Of several, pip installs the one whose marker matches."""
    lock: dict[str, list[str]] = {}
    text = re.sub("^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for requirement in re.split(r"\n(?=\w)", text.strip()):
        lock.setdefault(requirement.partition("==")[0], []).append(requirement)
    return lock


def read_roots(what: str) -> list[str]:
    """Returns the requirements in pyproject.toml of the service on a device, or of the build tools."""
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if what == "tools":
        return document["build-system"]["requires"]
    project = document["project"]
    return project["dependencies"] + project["optional-dependencies"][what]


def install(names: list[str], lock: dict[str, list[str]]) -> None:
    """Installs the packages with these names at their locked versions, without dependencies."""
    if ENGINE in names:
        sys.exit(f"{PYTHON} has no {ENGINE}: build the GPU image on an image of vLLM, which contains it")
    if "torch" in names:
        install_torch_cpu()
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(requirement for name in names if name != "torch" for requirement in lock[name]))
        file.flush()
        subprocess.run([*PIP_INSTALL, file.name], check=True)  # noqa: S603
    importlib.invalidate_caches()


def install_torch_cpu() -> None:
    """Installs torch's CPU build from pip's configured indexes, or from PyTorch's index of CPU wheels."""
    command = [*PIP_INSTALL, str(TORCH_CPU)]
    if subprocess.run(command, stderr=subprocess.PIPE, check=False).returncode != 0:  # noqa: S603
        subprocess.run([*command, "--index-url", TORCH_CPU_INDEX], check=True)  # noqa: S603


def lacking(roots: list[str], lock: dict[str, list[str]]) -> list[str]:
    """Returns the locked packages that are required, directly or by an installed package, and not installed."""
    return sorted({name for name, _, version in required(roots) if version is None and name in lock})


def unlike(roots: list[str]) -> list[str]:
    """Returns the names of roots that are installed in a version that they do not allow, except the engine."""
    return [name for name, _, _ in unsatisfied(required(roots, follow=False)) if name != ENGINE]


def conflicts(roots: list[str]) -> list[str]:
    """Returns a message for each installed version that violates a requirement."""
    return [
        f"{requirement} is required, but version {version} is installed"
        for _, requirement, version in unsatisfied(required(roots))
    ]


def unsatisfied(requirements: Iterable[Found]) -> Iterator[Found]:
    """Yields the requirements whose package is installed in a version that they do not allow."""
    for name, requirement, version in requirements:
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            yield name, requirement, version


def required(roots: list[str], *, follow: bool = True) -> Iterator[Found]:
    """Yields the roots and, with `follow`, the requirements of the installed packages that they lead to."""
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
