"""Owns `make audit`: the locks against the published advisories. Exit code 0: none applies; 1: some do; 3: not told, as
the advisories cannot be reached from here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NONE, SOME, NOT_TOLD = 0, 1, 3


def main() -> None:
    codes = [audit(lock) for lock in sorted((ROOT / "requirements").glob("*.lock"))]
    sys.exit(SOME if SOME in codes else max(codes))


def audit(lock: Path) -> int:
    """Prints what applies to a lock. Returns the exit code for it."""
    quiet = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [str(Path(sys.executable).parent / "pip-audit"), *quiet, "--requirement", str(lock)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    try:
        packages: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except ValueError:  # it says in prose that it reaches nothing
        packages = []
    return report(lock.name, packages, ran.stderr)


def report(name: str, packages: list[dict[str, Any]], said: str) -> int:
    """`packages` as pip-audit lists them: with `vulns`, or with `skip_reason` where the database knows none by name."""
    told = [package for package in packages if "vulns" in package]
    skipped = [package["name"] for package in packages if "vulns" not in package]
    if not told:
        last = said.strip().splitlines()[-1:] if not packages else ["it answers for no package"]
        show(f"{name}: not audited, the advisory database cannot be reached: {''.join(last)[:200]}")
        return NOT_TOLD
    found = [(package, advisory) for package in told for advisory in package["vulns"]]
    for package, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no version"
        show(f"{name}: {package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    show(f"{name}: {len(found)} advisories for {len(told)} packages; not known there: {', '.join(skipped) or 'none'}")
    return SOME if found else NONE


def show(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
