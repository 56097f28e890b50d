"""`make audit`: checks the locked packages against the published security advisories.

Exit code 0: no advisory applies. 1: at least one applies. 3: unknown, because the advisory database cannot be used.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NONE, SOME, UNKNOWN = 0, 1, 3


def main() -> None:
    # torch-cpu.lock names a build that advisories do not name; gpu.lock has the same version of torch.
    locks = sorted(set((ROOT / "requirements").glob("*.lock")) - {ROOT / "requirements" / "torch-cpu.lock"})
    codes = [audit(lock) for lock in locks]
    sys.exit(SOME if SOME in codes else max(codes))


def audit(lock: Path) -> int:
    """Prints the advisories that apply to the packages of a lock. Returns the exit code for this lock."""
    quiet = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [str(Path(sys.executable).parent / "pip-audit"), *quiet, "--requirement", str(lock)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    try:
        packages: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except ValueError:  # without a connection pip-audit prints plain text instead of JSON
        packages = []
    return report(lock.name, packages, ran.stderr)


def report(name: str, packages: list[dict[str, Any]], errors: str) -> int:
    """Prints the result for one lock and returns its exit code.

    `packages` is pip-audit's list. Each has `vulns`, or a `skip_reason` if the database has no package of this name.
    `errors` is what pip-audit printed on stderr.
    """
    audited = [package for package in packages if "vulns" in package]
    skipped = [package["name"] for package in packages if "vulns" not in package]
    if not audited:
        reason = "it returned no result for any package" if packages else "".join(errors.strip().splitlines()[-1:])
        show(f"{name}: not audited, the advisory database cannot be used: {reason[:200]}")
        return UNKNOWN
    found = [(package, advisory) for package in audited for advisory in package["vulns"]]
    for package, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no version"
        show(f"{name}: {package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    unknown = ", ".join(skipped) or "none"
    show(f"{name}: {len(found)} advisories for {len(audited)} packages; not in the database: {unknown}")
    return SOME if found else NONE


def show(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
